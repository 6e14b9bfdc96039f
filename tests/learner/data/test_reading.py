"""How often files are read and decoded, and the order of the results."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.backbones import read_ahead, read_image
from addenda.exceptions import DataError, UnsteadyError
from addenda.learner import ActivationCache, Augmentation
from addenda.learner.data import labelled
from tests.support.images import colour_folder

VARIED = LearnConfig(head_only=True, augmentation=Augmentation(views=3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Counter[str], Counter[str]]]:
    """Gives a function that returns the reads and decodes of each split since its last call."""
    reads, decodes, lock = Counter[str](), Counter[str](), threading.Lock()
    read_bytes = Path.read_bytes

    def counting_read(path: Path) -> bytes:
        if path.suffix == ".png":
            with lock:
                reads[path.parts[-3]] += 1
        return read_bytes(path)

    def counting_decode(source: Any, name: str) -> Any:
        with lock:
            decodes["train" if "/train/" in name else "test"] += 1
        return read_image(source, name)

    def counts() -> tuple[Counter[str], Counter[str]]:
        before = reads.copy(), decodes.copy()
        reads.clear()
        decodes.clear()
        return before

    monkeypatch.setattr(Path, "read_bytes", counting_read)
    monkeypatch.setattr(labelled, "read_image", counting_decode)
    return counts


def test_a_file_is_hashed_once_and_decoded_once_for_all_its_views(
    tiny: FrozenBackbone, registry: Registry, tmp_path: Path, counted: Callable[[], tuple[Counter[str], Counter[str]]]
) -> None:
    colour_folder(tmp_path / "set" / "train", per_class=4)
    colour_folder(tmp_path / "set" / "test", per_class=2, seed=50)
    learner = Learner(tiny, registry, ActivationCache(tmp_path / "cache"))
    learner.learn("one", tmp_path / "set", config=VARIED)
    assert counted() == ({"train": 24, "test": 12}, {"train": 12, "test": 12})
    learner.learn("two", tmp_path / "set" / "train", config=VARIED)
    assert counted() == ({"train": 12}, {})  # activations are cached: nothing is decoded
    learner.learn("one", tmp_path / "set", config=VARIED)
    assert counted() == ({"train": 12, "test": 6}, {})  # learned before
    learner.evaluate("one", tmp_path / "set")
    assert counted() == ({"test": 6}, {"test": 6})


def test_reading_ahead_keeps_the_order_of_results_and_errors() -> None:
    max_ahead, started = 0, []

    def read(row: int) -> int:
        started.append(row)
        if row % 7 == 3:
            raise DataError(f"row {row}")
        return 10 * row

    results = []
    for row, result in read_ahead(range(30), read, ahead=5, threads=3):
        max_ahead = max(max_ahead, len(started) - len(results))
        results.append(str(result) if isinstance(result, DataError) else result)
        assert row == len(results) - 1
    assert results == [f"row {row}" if row % 7 == 3 else 10 * row for row in range(30)]
    assert max_ahead <= 6  # five ahead, and the current one


def test_changed_data_end_the_reading() -> None:
    def read(row: int) -> int:
        raise UnsteadyError("it changed")

    with pytest.raises(UnsteadyError, match="it changed"):
        next(read_ahead([1, 2], read, ahead=2))
