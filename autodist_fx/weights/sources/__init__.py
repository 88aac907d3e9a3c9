"""Sources of weights: safetensors, GGUF, and a model in memory."""
