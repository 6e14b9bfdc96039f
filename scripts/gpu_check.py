"""`make gpu-check`: the exactness tests and the cost benchmark on a GPU, kept in one report file."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

NAMES = "vit_small_patch16_224,vit_base_patch16_224"
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def main() -> int:
    """Runs everything and writes docs/results/gpu-DATE.md; returns what the tests returned."""
    if not torch.cuda.is_available():
        print("No CUDA device is at hand: nothing to check.", file=sys.stderr)
        return 2
    bin_folder = Path(sys.executable).parent
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    tests = subprocess.run(
        [bin_folder / "pytest", "-q", "-m", "gpu", "tests/gpu"], capture_output=True, text=True, timeout=300
    )
    sections = [
        f"# {torch.cuda.get_device_name()}, {datetime.now(UTC):%Y-%m-%d}",
        f"Driver {driver}, CUDA {torch.version.cuda}, torch {torch.__version__}, timm {version('timm')}.",
        f"Made by `make gpu-check`.\n\n## Tests\n\n```\n{tests.stdout[-3000:]}```",
    ]
    for precision in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            command = [bin_folder / "addenda", "bench", "cost", "--quick", "--backbones", NAMES, "--batch", "64"]
            command += ["--device", "cuda", "--precision", precision, "--out", folder]
            cost = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
            table = Path(folder) / "cost.md"
            shown = table.read_text() if table.exists() else f"```\n{cost.stderr[-3000:]}```"
        sections.append(f"## Cost, batch 64, {precision}\n\n{shown}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"gpu-{datetime.now(UTC):%Y-%m-%d}.md"
    path.write_text("\n\n".join(sections) + "\n")
    print(f"Written: {path}")
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
