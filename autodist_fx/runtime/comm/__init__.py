"""Processes, and what they send each other."""
