"""Time and disk space of registry operations on each database."""
