"""One call of a model: its inputs, its outputs, its lengths, and the kinds of KV cache it may bring."""
