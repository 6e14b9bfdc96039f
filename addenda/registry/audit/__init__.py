"""Whether a registry is still what was written, and what changed from one version or scoring to the next."""
