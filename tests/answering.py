"""`addenda serve` with a plain route that answers images, and times of slow clients that a test can wait for."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI, Request

from addenda import cli
from addenda.serving import app, bodies, server
from addenda.serving.access import needs
from addenda.serving.bodies import read_body, while_connected

make_app = app.make_app


async def predict(request: Request) -> dict[str, Any]:
    service = request.app.state.service
    body = await read_body(request, service.limits.body_bytes)
    answered = await while_connected(request, service.answer([body]))
    tasks = {name: logits.numpy().tobytes().hex() for name, logits in answered.logits.items()}
    return {"generation": answered.snapshot.generation, "exact": answered.logits.exact, "tasks": tasks}


def make_answering_app(*arguments: Any, **options: Any) -> FastAPI:
    made = make_app(*arguments, **options)
    made.post("/predict", dependencies=[needs("predict")])(predict)
    return made


if __name__ == "__main__":
    app.make_app = make_answering_app
    server.HEAD_S = float(os.environ.get("HEAD_S", server.HEAD_S))
    bodies.BODY_S = float(os.environ.get("BODY_S", bodies.BODY_S))
    cli.main()
