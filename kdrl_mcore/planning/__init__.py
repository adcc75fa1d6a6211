"""What a run needs and how long it takes, before it is queued: memory of every rank, time by phase, the best layouts."""
