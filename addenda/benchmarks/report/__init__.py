"""Output of the benchmarks: tables, plots and JSON lines."""
