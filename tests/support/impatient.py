"""Runs `addenda serve` with short timeouts for slow clients, taken from the environment."""

from __future__ import annotations

import os

from addenda import cli
from addenda.serving import routes, server


def main() -> None:
    server.HEAD_S, routes.BODY_S = int(os.environ["HEAD_S"]), int(os.environ["BODY_S"])
    server.READ_S = int(os.environ.get("READ_S", server.READ_S))
    cli.main()
