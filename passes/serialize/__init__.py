"""Writes graphs as JSON, and reads them back."""
