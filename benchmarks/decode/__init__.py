"""Decode with this checkout and with another one in turns."""
