"""Learning, prediction and serving on a Ray cluster."""
