"""Measurements of this package beside its peers: `python -m benchmarks`, and NOTES.md for what was learnt."""
