"""The paper's table: full fine-tuning, heads, memory of several sizes, masked and not; as `addenda bench paper` has it.

    python paper_table.py IMAGES        # a folder of data sets, each with train/ and test/; a ViT-B/32 of ImageNet-21k

Without a folder it is a table in small: two sets of scikit-learn's digits on the backbone `glyphs`, in a minute or two.
The report is written to `paper-table/`; a run that was stopped goes on. arXiv 2203.15243.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from addenda import load_backbone
from addenda.benchmarks.baselines.paper_methods import BaselineConfig, Rate
from addenda.benchmarks.demo import digits
from addenda.benchmarks.paper.paper_grid import METHODS, OURS, PaperConfig, run_paper

OUT = Path("paper-table")

if len(sys.argv) > 1:
    data, methods, seeds = Path(sys.argv[1]), METHODS, 3
    comparison = PaperConfig(load_backbone("vit_base_patch32_224.augreg_in21k"), data)
else:
    data, seeds = Path("paper-images"), 1
    for name, keep in {"low": (0, 1, 2), "high": (7, 8, 9)}.items():
        for part in ("train", "test"):
            digits(keep, part == "test", limit=90).save(data / name / part)
    methods = ("full", "head", "head+class", "memory-1", "memory-5", "unmasked-5", "pairs", "collapse")
    ours, baselines = (
        replace(OURS, epochs=2, learning_rate=(0.003,)),
        BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-3),)),
    )
    comparison = PaperConfig(load_backbone("glyphs"), data, limit=45, ours=ours, baselines=baselines)

sets = sorted(folder.name for folder in data.iterdir() if folder.is_dir())
cells = run_paper(comparison, sets, seeds, methods, OUT)
