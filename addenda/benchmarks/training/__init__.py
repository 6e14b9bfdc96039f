"""Time and memory of learning a task."""
