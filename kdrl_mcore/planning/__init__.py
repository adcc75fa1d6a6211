"""Estimates made before a run is queued: the memory of every rank, the time of each phase, and the best layouts."""
