"""Paths of this checkout, the data next to it, and the tests' data."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
SHARED = ROOT.parent / "shared" / "data"
"""Real weights and images, if they are next to the checkout."""
DATA = ROOT / "tests" / "data"
"""Registries that earlier versions created, and a photo in HEIC, which no installed package can write."""
