"""Taskmesh against what its users would take instead, and against the limits of its parts: `make bench`."""
