"""Training: one loop (loop.py) and one recipe per family."""
