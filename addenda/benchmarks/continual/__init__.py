"""Streams of tasks: who remembers, at what price, with and without being told the task."""
