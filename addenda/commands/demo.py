"""The `demo` command."""

from __future__ import annotations

import typer


def demo() -> None:
    """Learns five tasks one after another and proves that no earlier one moved. Under a minute, no network."""
    from addenda.benchmarks.demo import run_demo

    if not run_demo():
        raise typer.Exit(1)
