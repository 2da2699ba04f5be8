"""Training: one loop, one file per stage."""
