"""torch.fx passes: from a traced graph to an op graph, and from a plan to one graph per rank."""
