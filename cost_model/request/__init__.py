"""Reads what users ask of a plan: pins, cuts, devices, memory limits, sizes."""
