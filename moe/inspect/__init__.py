"""What experts learned: which domains they prefer, as figures and as pictures."""
