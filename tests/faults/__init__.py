"""What can go wrong in a long run, and what must remain of the run."""
