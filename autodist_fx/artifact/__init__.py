"""Splits on disk: plan, every rank's graph and weights, and a manifest with a digest of each file. docs/artifact.md."""
