"""The commands: a module for each group, and what they share. They import what is heavy only when they run."""
