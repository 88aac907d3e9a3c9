"""A rank's proven graph, made ready to be run many times."""
