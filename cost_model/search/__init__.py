"""From an op graph and a request to the best plan."""
