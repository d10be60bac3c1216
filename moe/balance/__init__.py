"""Balance of the experts: what is counted (statistics), over which tokens (load), and the losses made of it."""
