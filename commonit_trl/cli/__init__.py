"""The `commonit` command."""
