"""Triton's client calls a server, which loads a new task while it runs.

Run `pip install '.[serve]' 'tritonclient[http]'` first.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput

from addenda import LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import digits

SERVE = ("serve", "--registry", "served.db", "--port", "0", "--drain", "0")


def png_input(count: int) -> InferInput:
    """Digits from 0 to 3 as PNG files."""
    infer_input = InferInput("image", [count], "BYTES")
    pngs = [io.BytesIO() for _ in range(count)]
    for png, image in zip(pngs, digits((0, 1, 2, 3), test=True).images, strict=False):
        image.save(png, "PNG")
    infer_input.set_data_from_numpy(np.array([png.getvalue() for png in pngs], dtype=object))
    return infer_input


with Registry.open("served.db") as registry:
    learner = Learner(load_backbone("glyphs"), registry)
    learner.learn("low", digits((0, 1), test=False, limit=60), config=LearnConfig(epochs=2))
    server = subprocess.Popen([sys.executable, "-m", "addenda.cli", *SERVE], stdout=subprocess.PIPE, text=True)
    with server:
        try:
            for line in server.stdout:
                if address := re.search(r"Serving .* on http://(\S+)", line):
                    break
            else:
                sys.exit(line)
            client = InferenceServerClient(address[1], network_timeout=60)
            first = client.infer("low", [png_input(8)])
            print("labels:", *(label.decode() for label in first.as_numpy("label")))

            learner.learn("high", digits((2, 3), test=False, limit=60), config=LearnConfig(epochs=2))
            deadline = time.monotonic() + 30
            while not client.is_model_ready("high") and time.monotonic() < deadline:
                time.sleep(0.1)
            both = client.infer("combined", [png_input(8)])
            print("outputs of one request:", *sorted(output["name"] for output in both.get_response()["outputs"]))
            same = first.as_numpy("logits").tobytes() == both.as_numpy("low.logits").tobytes()
            print("low's logits:", "bitwise identical" if same else "DIFFERENT")
        finally:
            server.terminate()
