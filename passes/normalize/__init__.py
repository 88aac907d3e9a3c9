"""Passes over the whole traced graph: one way to write each thing."""
