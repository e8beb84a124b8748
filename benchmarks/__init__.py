"""Measurements of what the project claims; ``python -m benchmarks`` runs all of them."""
