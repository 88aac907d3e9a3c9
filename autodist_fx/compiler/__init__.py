"""Compiles a model into planned, verified programs of all ranks."""
