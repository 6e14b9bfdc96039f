"""What a registry takes to register, load, list and tell of a change."""
