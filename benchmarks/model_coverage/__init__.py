"""What benchmarks/coverage.py is made of: tiny models of every type, the check of one, and the report of all."""
