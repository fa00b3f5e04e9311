"""How fast, against what, and how far from the limit: `python -m benchmarks --help`."""
