"""The run directory: its lock, its branches, and the record of its starts."""
