"""Searches the best plan for an op graph and a request."""
