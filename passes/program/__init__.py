"""A rank's program: its graph, its slices of parameters, the gradient sums it owes."""
