"""HTTP serving of the combined model of all registered tasks."""
