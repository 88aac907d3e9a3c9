"""Processes, process groups, and the messages that ranks send each other."""
