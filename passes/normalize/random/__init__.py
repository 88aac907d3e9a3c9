"""Passes that make random ops the same on every mesh."""
