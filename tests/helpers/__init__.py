"""Shared by the tests: tiny real models and data, recorders of batches, and processes that train."""
