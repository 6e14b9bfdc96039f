"""Runs `addenda` as if the packages in the environment's WITHOUT were not installed."""

from __future__ import annotations

import os
import sys


def main() -> None:
    absent = os.environ["WITHOUT"].split()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("addenda", *absent)]:
        del sys.modules[name]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    from addenda import cli

    cli.main()
