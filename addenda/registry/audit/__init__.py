"""Integrity checks of a registry, and comparisons of versions and evaluations."""
