"""Paired runs of several strategies: what they are, how they are done and measured, and what they say together."""
