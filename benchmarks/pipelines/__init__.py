"""Pipelines of two ranks, kept full."""
