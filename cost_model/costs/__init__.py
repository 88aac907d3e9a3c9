"""Predicts seconds and bytes: hardware, compute, communication, memory."""
