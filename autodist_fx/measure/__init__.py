"""Measures this machine for predictions: what ops, messages and calls take, alone and with other ranks at work."""
