"""From a normalised fx graph to the cost model's op graph."""
