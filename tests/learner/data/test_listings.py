"""Listings: their columns and values, and every invalid form."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pyarrow as pa
import pytest
from pyarrow import parquet

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError
from addenda.learner.data import has_test_part, open_images
from addenda.learner.data.labelled import LabelledImages
from tests.support.images import colour_folder

Write = Callable[[str, list[dict[str, Any]]], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images red/0.png to red/7.png, and the same for green and blue."""
    return colour_folder(tmp_path / "data")


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0])]
    for row in rows:
        values = ["|".join(v) if isinstance(v, list) else "" if v is None else str(v) for v in row.values()]
        lines.append(",".join(values))
    (folder / "listing.csv").write_text("\n".join(lines) + "\n")
    return folder / "listing.csv"


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), folder / "listing.parquet")
    return folder / "listing.parquet"


BOTH = pytest.mark.parametrize("write", [write_csv, write_parquet], ids=["csv", "parquet"])


def labels_of(images: LabelledImages) -> list[tuple[str, str]]:
    return [(path.name, images.labels[target]) for path, target in zip(images.items, images.targets, strict=True)]


def refused(file: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        open_images(file, split).check_whole(skip_bad=False)
    assert repr(str(file)) in str(caught.value)
    return str(caught.value)


@BOTH
def test_a_listing_of_a_folder_equals_that_folder(folder: Path, write: Write) -> None:
    rows = [{"path": f"{p.parent.name}/{p.name}", "label": p.parent.name} for p in sorted(folder.rglob("*.png"))]
    images, same = open_images(write(folder, rows)), open_images(folder)
    assert images.labels == same.labels == ("blue", "green", "red")
    assert images.targets.tolist() == same.targets.tolist()
    assert list(images.items) == list(same.items)
    assert images.fingerprint() == same.fingerprint()


@BOTH
def test_a_multi_label_listing_gives_any_number_of_labels(folder: Path, write: Write) -> None:
    rows = [
        {"path": "red/0.png", "labels": ["warm", "dark"]},
        {"path": "red/1.png", "labels": []},
        {"path": "red/2.png", "labels": ["dark"]},
    ]
    images = open_images(write(folder, rows))
    assert (images.objective.name, images.labels) == ("multi-label", ("dark", "warm"))
    assert images.targets.tolist() == [[True, True], [False, False], [True, False]]


def test_parquet_accepts_labels_as_text(folder: Path) -> None:
    rows = [{"path": "red/0.png", "labels": "warm | dark"}, {"path": "red/1.png", "labels": None}]
    images = open_images(write_parquet(folder, rows))
    assert images.targets.tolist() == [[True, True], [False, False]]


def test_numbers_become_text_labels(folder: Path) -> None:
    images = open_images(write_parquet(folder, [{"path": f"red/{i}.png", "label": i} for i in (0, 1)]))
    assert images.labels == ("0", "1")


@BOTH
def test_one_listing_holds_both_splits_and_one_list_of_classes(folder: Path, write: Write) -> None:
    rows = [
        {"path": "red/0.png", "label": "red", "split": "train"},
        {"path": "blue/0.png", "label": "blue", "split": "train"},
        {"path": "red/1.png", "label": "red", "split": "test"},
    ]
    file = write(folder, rows)
    assert has_test_part(file)
    assert labels_of(open_images(file, "train")) == [("0.png", "red"), ("0.png", "blue")]
    assert labels_of(open_images(file, "test")) == [("1.png", "red")]
    assert open_images(file, "test").labels == ("blue", "red")
    without = write(folder, [{**row, "split": "train"} for row in rows])
    assert not has_test_part(without)
    assert "no row with split 'test'" in refused(without, "test")


def test_a_listing_without_splits_is_used_whole(folder: Path) -> None:
    file = write_csv(folder, [{"path": "red/0.png", "label": "a"}, {"path": "red/1.png", "label": "b"}])
    assert not has_test_part(file)
    assert len(open_images(file, "train")) == len(open_images(file, "test")) == 2


def test_further_columns_absolute_paths_quotes_and_a_byte_order_mark_are_accepted(folder: Path, tmp_path: Path) -> None:
    (folder / "red, dark.png").write_bytes((folder / "red" / "0.png").read_bytes())
    text = f'id, label ,path\n1, "a" ,"red, dark.png"\n2,b,{folder / "blue" / "0.png"}\n\n'.replace(' "a" ', "a")
    (folder / "listing.csv").write_text("\ufeff" + text, encoding="utf-8")
    assert labels_of(open_images(folder / "listing.csv")) == [("red, dark.png", "a"), ("0.png", "b")]


def test_spaces_after_commas_are_no_part_of_a_field(folder: Path) -> None:
    (folder / "listing.csv").write_text('path, label\nred/0.png, "red, dark"\n red/1.png, red\nred/2.png,red\n')
    assert labels_of(open_images(folder / "listing.csv")) == [
        ("0.png", "red, dark"),
        ("1.png", "red"),
        ("2.png", "red"),
    ]


def test_the_parent_of_a_linked_folder_is_the_one_that_the_link_names(folder: Path, tmp_path: Path) -> None:
    other = colour_folder(tmp_path / "other", seed=1)
    (folder / "link").symlink_to(other / "red")
    (folder / "listing.csv").write_text("path,label\nlink/../blue/0.png,a\nred/../blue/0.png,b\nblue/0.png,b\n")
    images = open_images(folder / "listing.csv")
    assert [Path(item).read_bytes() for item in images.items] == [
        (other / "blue" / "0.png").read_bytes(), (folder / "blue" / "0.png").read_bytes(),
    ]  # fmt: skip


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_listing_names_files_in_either_unicode_form(folder: Path, listed: str, stored: str) -> None:
    (folder / "red" / "0.png").rename(folder / "red" / normalize(stored, "caf\xe9.png"))
    row = normalize(listed, "red/caf\xe9.png,red")
    (folder / "listing.csv").write_text(f"path,label\n{row}\nred/1.png,red\n", encoding="utf-8")
    assert len(open_images(folder / "listing.csv").check_whole(skip_bad=False)) == 2


def test_a_repeated_row_counts_once(folder: Path) -> None:
    rows = [{"path": path, "label": "a"} for path in ("red/0.png", "red/../red/0.png", "red/1.png")]
    assert len(open_images(write_csv(folder, rows))) == 2


def test_a_task_is_learned_and_scored_from_one_listing(tiny: FrozenBackbone, registry: Registry, folder: Path) -> None:
    rows = [
        {"path": f"{c}/{i}.png", "label": c, "split": "test" if i > 5 else "train"}
        for c in ("red", "green", "blue")
        for i in range(8)
    ]
    file = write_csv(folder, rows)
    learner = Learner(tiny, registry)
    task = learner.learn("colours", file, config=LearnConfig(optimizer="sgd", epochs=1, learning_rate=0.1))
    assert task.labels == ("blue", "green", "red")
    assert (task.data["num_images"], task.metrics["test"]["num_images"]) == (18, 6)
    assert learner.evaluate("colours", file).metrics == task.metrics["test"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_missing_listing_is_reported(tmp_path: Path) -> None:
    assert "There is no listing" in refused(tmp_path / "nothing.csv")
    assert "There is no listing" in refused(tmp_path / "nothing.parquet")


def test_another_file_is_refused_with_the_accepted_formats(tmp_path: Path) -> None:
    (tmp_path / "listing.json").write_text("{}")
    assert "a listing that ends in .csv or .parquet" in refused(tmp_path / "listing.json")


@pytest.mark.parametrize("header", ["path,class", "file,label", "path;label", "labels"])
def test_missing_columns_are_reported_with_the_existing_ones(tmp_path: Path, header: str) -> None:
    (tmp_path / "listing.csv").write_text(f"{header}\n")
    message = refused(tmp_path / "listing.csv")
    assert "requires a column 'path', and 'label'" in message
    assert f"Found: {', '.join(map(repr, header.split(',')))}." in message


def test_a_binary_file_is_refused_with_a_short_message(tmp_path: Path) -> None:
    (tmp_path / "listing.csv").write_bytes(b"\0" * 9000 + b"," * 500)
    message = refused(tmp_path / "listing.csv")
    assert "requires a column 'path'" in message
    assert "and 489 more." in message
    assert len(message) < 1000


def test_columns_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "listing.csv").write_text("path,label,labels\n")
    assert "both columns 'label' and 'labels'" in refused(tmp_path / "listing.csv")
    (tmp_path / "listing.csv").write_text("path,label,path\n")
    assert "several columns 'path'" in refused(tmp_path / "listing.csv")


@BOTH
def test_missing_columns_are_refused_in_either_format(folder: Path, write: Write) -> None:
    assert "Found: 'path', 'class'." in refused(write(folder, [{"path": "red/0.png", "class": "red"}]))


def test_empty_listings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "listing.csv").write_text("")
    assert "is empty. Its first line must name the columns: path,label." in refused(tmp_path / "listing.csv")
    (tmp_path / "listing.csv").write_text("path,label\n")
    assert "has column names but no rows" in refused(tmp_path / "listing.csv")
    (tmp_path / "listing.parquet").write_bytes(b"")
    assert "cannot be read as Parquet" in refused(tmp_path / "listing.parquet")


def test_files_that_are_not_utf_8_csv_or_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "listing.csv").write_bytes("path,label\nä.png,Bär\n".encode("latin-1"))
    assert "is not UTF-8" in refused(tmp_path / "listing.csv")
    (tmp_path / "listing.csv").write_text('path,label\n"a"b,c\n')
    assert "cannot be read as CSV" in refused(tmp_path / "listing.csv")
    (tmp_path / "listing.parquet").write_text("path,label\n")
    assert "cannot be read as Parquet" in refused(tmp_path / "listing.parquet")


def test_a_listing_of_a_spreadsheet_is_read_or_explained(folder: Path) -> None:
    file = folder / "listing.csv"
    file.write_text("path,label\nred/0.png,red\nblue/0.png,blue\n,\n , \n")
    assert len(open_images(file)) == 2
    file.write_text("path\tlabel\nred/0.png\tred\n", encoding="utf-16")
    assert "is UTF-16 text. Save it as CSV in UTF-8, with commas." in refused(file)
    file.write_text("Path,Label\nred/0.png,red\n")
    assert "Found: 'Path', 'Label'. Column names are in lower case." in refused(file)
    file.write_text("path,label\nhttps://example.org/a.png,red\n")
    assert "line 2: its path is 'https://example.org/a.png'; give the path of a file, since URLs" in refused(file)


@BOTH
def test_up_to_ten_missing_files_are_listed_with_their_position(folder: Path, write: Write) -> None:
    rows = [{"path": "red/0.png", "label": "red"}, *({"path": f"{i}.png", "label": "red"} for i in range(12))]
    message = refused(write(folder, rows))
    assert "12 of 13 images" in message
    position = "line 3" if write is write_csv else "row 2"
    assert f"\n  {position}: there is no file {str(folder / '0.png')!r}" in message
    assert repr(str(folder / "9.png")) in message
    assert repr(str(folder / "10.png")) not in message
    assert "… and 2 more\nFix or remove them, or pass --skip-bad" in message
    assert len(open_images(folder / f"listing.{'csv' if write is write_csv else 'parquet'}")) == 1


@BOTH
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "red/0.png", "label": "", "split": "train"}, "it has an empty label"),
        ({"path": "red/0.png", "label": " ", "split": "train"}, "it has an empty label"),
        ({"path": "", "label": "red", "split": "train"}, "its path is empty"),
        ({"path": "red/0.png", "label": "red", "split": "left"}, "its split is 'left'; it must be train or test"),
        ({"path": "red/0.png", "label": "red", "split": ""}, "its split is ''; it must be train or test"),
        ({"path": "red/0.png", "label": "red", "split": "val"}, "Addenda draws its own validation split from train"),
        ({"path": "red/1.png", "label": "blue", "split": "train"}, ", with other labels"),
        ({"path": "red/1.png", "label": "red", "split": "test"}, ", in another split"),
    ],
)
def test_an_invalid_row_is_reported_with_the_reason(
    folder: Path, write: Write, row: dict[str, str], message: str
) -> None:
    good = {"path": "red/1.png", "label": "red", "split": "train"}
    error = refused(write(folder, [good, row]))
    assert f"\n  {'line 3' if write is write_csv else 'row 2'}: " in error
    assert message in error
    assert "1 of 2 rows" in error


@pytest.mark.parametrize(
    ("fields", "message"),
    [("red/0.png", "it has 1 fields"), ("red/0.png,red,dark", "quote text that contains a comma")],
)
def test_a_row_of_another_length_is_refused(folder: Path, fields: str, message: str) -> None:
    (folder / "listing.csv").write_text(f"path,label\nred/1.png,red\n{fields}\n")
    error = refused(folder / "listing.csv")
    assert "line 3: " in error
    assert message in error


def test_empty_labels_between_bars_are_refused(folder: Path) -> None:
    file = write_csv(folder, [{"path": "red/0.png", "labels": ["a", "", "b"]}])
    assert "line 2: it has an empty label" in refused(file)


def test_a_listing_without_any_label_is_refused(folder: Path) -> None:
    assert "No image in the listing" in refused(write_csv(folder, [{"path": "red/0.png", "labels": []}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "red/0.png", "label": 0.5}, "its value 0.5 is neither text nor a whole number"),
        ({"path": 3, "label": "red"}, "its path is 3"),
        ({"path": "red/0.png", "labels": 3}, "its labels are 3, which is neither text nor a list"),
    ],
)
def test_parquet_values_of_another_type_are_refused(folder: Path, row: dict[str, Any], message: str) -> None:
    assert message in refused(write_parquet(folder, [row]))


def test_without_pyarrow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(folder, [{"path": "red/0.png", "label": "red"}])
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'addenda[parquet]'" in refused(file)
