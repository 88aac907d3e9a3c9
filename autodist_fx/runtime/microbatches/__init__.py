"""Microbatches in flight while a rank runs a model: rows or tokens in parts that follow each other through stages."""
