"""How tasks travel between registries: bundles, merges, backups."""
