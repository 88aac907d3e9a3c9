"""Traces Python's ifs, loops and numbers."""
