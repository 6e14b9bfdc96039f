"""Twenty folders of photos become twenty tasks, and one server answers them all from one pass over an image.

Where there is no folder `photos`, it is drawn: twenty pairs of scikit-learn's digits. With photos of your own take
`load_backbone("vit_base_patch16_224.augreg_in21k")`, and leave `config` out.
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
        for part in ("train", "test"):
            digits(pair, part == "test", limit=60).save(PHOTOS / "digits-{}{}".format(*pair) / part)

rows = [LearnRow(folder.name, folder, config=LearnConfig(epochs=2)) for folder in sorted(PHOTOS.iterdir())]
with Registry.open("photos.db") as registry:
    for outcome in learn_many(Learner(load_backbone("glyphs"), registry), rows):
        print(f"{outcome.name}: {outcome.reason or outcome.state}")

right = 0
with subprocess.Popen([sys.executable, "-m", "addenda.cli", *SERVE], stdout=subprocess.PIPE, text=True) as server:
    try:
        for line in server.stdout:
            if found := re.search(r"Serving .* on (http://\S+)", line):
                break
        else:
            sys.exit(line)
        for row in rows:
            photo = next((row.data / "test").rglob("*.png"))
            with urlopen(f"{found[1]}/api/v1/predict", data=photo.read_bytes()) as answer:
                tasks = json.load(answer)["tasks"]
            right += tasks[row.name]["labels"][0]["label"] == photo.parent.name
    finally:
        server.terminate()
print(f"{len(tasks)} tasks answered each of {len(rows)} photos; of its own task's answers {right} are right.")
