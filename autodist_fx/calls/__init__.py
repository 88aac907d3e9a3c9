"""One call of a model: inputs, outputs, lengths and kinds of cache."""
