"""What many tasks cost beside the backbone alone."""
