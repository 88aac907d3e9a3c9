"""Writes into tensors become values."""
