"""Graphs as JSON, and back."""
