"""Splits on disk (docs/artifact.md): the plan, every rank's
graph and weights, and a manifest with each file's digest."""
