"""The op graph, placements, op rules, costs and searches: plain Python, no torch."""

from cost_model import conv_rules as conv_rules  # a table of its own, which has to be read once
