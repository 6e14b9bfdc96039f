"""Learns a task from each of twenty folders of photos; one server then predicts all tasks in one forward pass.

Without a folder `photos`, it is created from twenty pairs of scikit-learn's digits. For your own photos use
`load_backbone("vit_base_patch16_224.augreg_in21k")` and leave out `config`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations, islice
from pathlib import Path
from urllib.request import urlopen

from addenda import LearnConfig, Learner, Registry, load_backbone
from addenda.benchmarks.demo import digits
from addenda.learner import LearnRow, learn_many

PHOTOS = Path("photos")
SERVE = ("serve", "--registry", "photos.db", "--port", "0", "--drain", "0")


if not PHOTOS.exists():
    for pair in islice(combinations(range(10), 2), 20):
        for split in ("train", "test"):
            digits(pair, split == "test", limit=60).save(PHOTOS / "digits-{}{}".format(*pair) / split)

rows = [LearnRow(folder.name, folder, config=LearnConfig(epochs=2)) for folder in sorted(PHOTOS.iterdir())]
with Registry.open("photos.db") as registry:
    for outcome in learn_many(Learner(load_backbone("glyphs"), registry), rows):
        print(f"{outcome.name}: {outcome.reason or outcome.state}")

num_correct = 0
with subprocess.Popen([sys.executable, "-m", "addenda.cli", *SERVE], stdout=subprocess.PIPE, text=True) as server:
    try:
        for line in server.stdout:
            if address := re.search(r"Serving .* on (http://\S+)", line):
                break
        else:
            sys.exit(line)
        for row in rows:
            photo = next((row.data / "test").rglob("*.png"))
            with urlopen(f"{address[1]}/api/v1/predict", data=photo.read_bytes()) as response:
                tasks = json.load(response)["tasks"]
            num_correct += tasks[row.name]["labels"][0]["label"] == photo.parent.name
    finally:
        server.terminate()
print(f"{len(tasks)} tasks predicted for each of {len(rows)} photos; in its own task, {num_correct} are correct.")
