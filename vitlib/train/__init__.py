"""Training: the loop, its data, its losses."""
