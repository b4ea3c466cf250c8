"""Helpers of the tests: tiny real models and data, recorders of batches, and training processes."""
