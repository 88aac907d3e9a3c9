"""The parts of benchmarks/coverage.py: tiny models of every type, the check of one, and the report of all."""
