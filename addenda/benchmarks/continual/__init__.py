"""Benchmark on streams of tasks: accuracy, forgetting and cost, task-incremental and class-incremental."""
