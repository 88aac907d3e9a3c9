"""Sharding rules: how each kind of op may be split."""
