"""Checkpoints: locating them, and reading only the slices that a rank holds."""
