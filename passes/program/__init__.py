"""A rank's program: its graph, its slices of parameters, the gradients it owes."""
