"""KV caches on a rank."""
