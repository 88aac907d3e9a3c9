"""Passes over the whole traced graph, which leave one way to write each thing."""
