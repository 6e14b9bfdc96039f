"""Learning, predicting and serving on a Ray cluster."""
