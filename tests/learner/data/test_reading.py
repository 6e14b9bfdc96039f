"""How often files are read and decoded, and in which order what was read is given."""

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
    """Gives how often pictures of each part were read and decoded since it was last asked."""
    reads, decodes, taking = Counter[str](), Counter[str](), threading.Lock()
    read_bytes = Path.read_bytes

    def counting_read(path: Path) -> bytes:
        if path.suffix == ".png":
            with taking:
                reads[path.parts[-3]] += 1
        return read_bytes(path)

    def counting_decode(source: Any, name: str) -> Any:
        with taking:
            decodes["train" if "/train/" in name else "test"] += 1
        return read_image(source, name)

    def since() -> tuple[Counter[str], Counter[str]]:
        found = reads.copy(), decodes.copy()
        reads.clear()
        decodes.clear()
        return found

    monkeypatch.setattr(Path, "read_bytes", counting_read)
    monkeypatch.setattr(labelled, "read_image", counting_decode)
    return since


def test_a_file_is_hashed_once_and_decoded_once_for_all_its_views(
    tiny: FrozenBackbone, registry: Registry, tmp_path: Path, counted: Callable[[], tuple[Counter[str], Counter[str]]]
) -> None:
    colour_folder(tmp_path / "set" / "train", per_class=4)
    colour_folder(tmp_path / "set" / "test", per_class=2, seed=50)
    learner = Learner(tiny, registry, ActivationCache(tmp_path / "cache"))
    learner.learn("one", tmp_path / "set", config=VARIED)
    assert counted() == ({"train": 24, "test": 12}, {"train": 12, "test": 12})
    learner.learn("two", tmp_path / "set" / "train", config=VARIED)
    assert counted() == ({"train": 12}, {})  # activations are kept: nothing is decoded
    learner.learn("one", tmp_path / "set", config=VARIED)
    assert counted() == ({"train": 12, "test": 6}, {})  # learned before
    learner.evaluate("one", tmp_path / "set")
    assert counted() == ({"test": 6}, {"test": 6})


def test_what_is_read_ahead_comes_in_order_and_errors_come_in_its_place() -> None:
    most, begun = 0, []

    def read(row: int) -> int:
        begun.append(row)
        if row % 7 == 3:
            raise DataError(f"row {row}")
        return 10 * row

    found = []
    for row, one in read_ahead(range(30), read, ahead=5, threads=3):
        most = max(most, len(begun) - len(found))
        found.append(str(one) if isinstance(one, DataError) else one)
        assert row == len(found) - 1
    assert found == [f"row {row}" if row % 7 == 3 else 10 * row for row in range(30)]
    assert most <= 6  # five ahead, and the one that is given


def test_unsteady_data_end_the_reading() -> None:
    def read(row: int) -> int:
        raise UnsteadyError("it changed")

    with pytest.raises(UnsteadyError, match="it changed"):
        next(read_ahead([1, 2], read, ahead=2))
