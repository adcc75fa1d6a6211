"""What goes wrong on a long run, and what must be left of it."""
