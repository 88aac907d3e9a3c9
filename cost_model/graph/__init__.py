"""The op graph as plain data: ops, tensors, size symbols, placements, roles."""
