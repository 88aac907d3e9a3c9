"""From a model to planned, verified programs of all ranks."""
