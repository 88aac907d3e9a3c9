"""The op graph, placements, op rules, costs and searches: plain Python, no torch."""

