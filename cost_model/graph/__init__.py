"""The op graph: ops, tensors, sizes by symbol, placements. Data only."""
