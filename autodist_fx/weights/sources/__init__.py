"""Where weights are read from."""
