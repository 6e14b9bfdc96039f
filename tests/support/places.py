"""Where things are: this checkout, what lies beside it, and what the tests keep."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
SHARED = ROOT.parent / "shared" / "data"
"""Real weights and images, where they lie beside it."""
DATA = ROOT / "tests" / "data"
"""Registries that earlier versions made."""
