"""Reproduces the table of the paper (arXiv 2203.15243), like `addenda bench paper`.

The methods are full fine-tuning, heads, and memory of several sizes, masked and unmasked.

    python paper_table.py IMAGES        # a folder of datasets, each with train/ and test/; ViT-B/32 of ImageNet-21k

Without a folder it runs on two small datasets of scikit-learn's digits and the backbone `glyphs`, in a minute or two.
The report is written to `paper-table/`; an interrupted run resumes.
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
    for name, classes in {"low": (0, 1, 2), "high": (7, 8, 9)}.items():
        for split in ("train", "test"):
            digits(classes, split == "test", limit=90).save(data / name / split)
    methods = ("full", "head", "head+class", "memory-1", "memory-5", "unmasked-5", "pairs", "collapse")
    ours, baselines = (
        replace(OURS, epochs=2, learning_rate=(0.003,)),
        BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-3),)),
    )
    comparison = PaperConfig(load_backbone("glyphs"), data, limit=45, ours=ours, baselines=baselines)

datasets = sorted(folder.name for folder in data.iterdir() if folder.is_dir())
cells = run_paper(comparison, datasets, seeds, methods, OUT)
