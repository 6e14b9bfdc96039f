"""The commands, one module for each group. They import heavy packages only when they run."""
