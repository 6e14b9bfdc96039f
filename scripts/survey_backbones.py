"""Writes docs/results/backbones.json: which of timm's models carry layer heads and tokens, and why others do not.

python scripts/survey_backbones.py            # half an hour on two cores; builds every model without its weights
python scripts/write_results.py               # writes the table of docs/backbones.md from it
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from multiprocessing import Pool
from pathlib import Path

import timm
from torch import set_num_threads

from addenda.backbones.scope import FAMILIES, Listed, catalogue

RECORD = Path(__file__).resolve().parents[1] / "docs" / "results" / "backbones.json"
PLAIN = {timm_class.__name__ for timm_class in FAMILIES}


def main() -> None:
    """Checks every model and writes the counts."""
    with Pool(2, initializer=set_num_threads, initargs=(1,)) as pool:
        rows = [row for (row,) in pool.imap_unordered(checked, timm.list_models(), chunksize=4)]
    rows.sort()
    without_layer_heads = defaultdict(list)
    for row in rows:
        if row.layer_heads is not None:
            without_layer_heads[row.layer_heads].append(row.name)
    vits = [row for row in rows if row.timm_class in PLAIN]
    record = {
        "timm": timm.__version__,
        "models": len(rows),
        "classes": len({row.timm_class for row in rows}),
        "layer_heads": sum(row.layer_heads is None for row in rows),
        "tokens": sum(row.tokens is None for row in rows),
        "vits": len(vits),
        "without_layer_heads": dict(without_layer_heads),
        "vits_without_tokens": dict(Counter(row.tokens for row in vits if row.tokens is not None)),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def checked(name: str) -> list[Listed]:
    """The row of one model."""
    return list(catalogue(name))


if __name__ == "__main__":
    main()
