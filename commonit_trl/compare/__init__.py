"""Paired runs of several strategies: run them, measure held-out rows, compare the results."""
