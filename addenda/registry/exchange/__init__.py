"""Exchange of tasks between registries: bundles, merges and backups."""
