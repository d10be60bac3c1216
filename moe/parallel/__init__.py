"""Which ranks hold which experts (groups), and how rows travel between them (dispatch)."""
