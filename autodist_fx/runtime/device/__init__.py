"""The device of one rank: which one it is, what crosses between it and main memory, and what CUDA alone has."""
