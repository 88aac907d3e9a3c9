"""Runs all ranks in this process."""
