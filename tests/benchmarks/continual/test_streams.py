"""Streams: configuration, where images are found, and how they become experiences."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from addenda.benchmarks.continual.config import STREAMS, StreamConfig, build_stream, read_config, stream_names
from addenda.benchmarks.continual.sources import open_folder
from addenda.benchmarks.continual.stream import ImageSet, Stream, by_class
from addenda.exceptions import DataError
from addenda.learner.data.labelled import LabelledImages
from tests.support.images import colour_folder
from tests.support.places import ROOT, SHARED
from tests.support.stream_folders import MISSING, PUT, put, put_core50, put_cub200, put_domainnet, put_mnist, put_splits

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load


def identities(images: LabelledImages) -> list[object]:
    """The identity of each image: its file, or the id of its pixels."""
    return [item if isinstance(item, Path) else id(item[0]) for item in (images.items[i] for i in range(len(images)))]


def build(values: dict[str, object], root: Path, **settings: object) -> Stream:
    return build_stream(StreamConfig.model_validate({"name": "own", "data": values, **settings}), root)


def test_every_packaged_stream_is_tested() -> None:
    assert sorted([*PUT, *MISSING]) == stream_names()


@pytest.mark.parametrize("name", stream_names())
def test_a_packaged_stream_has_a_description_and_a_command(name: str) -> None:
    config = read_config(name)
    assert config.name == name
    assert config.about
    assert config.hardware
    assert re.match(rf"addenda bench continual {name} .*--out {name}$", config.command)
    assert (config.seeds, config.methods) == (3, None)


@pytest.mark.parametrize("name", sorted(PUT))
def test_a_packaged_stream_is_built_from_a_folder(name: str, tmp_path: Path) -> None:
    make, num_classes = PUT[name]
    make(tmp_path)
    stream = build_stream(read_config(name), tmp_path)
    assert stream.name == name
    assert [len(experience.classes) for experience in stream.experiences] == num_classes
    assert len({experience.name for experience in stream.experiences}) == len(num_classes)
    learned = [number for experience in stream.experiences for number in experience.classes]
    assert (len(set(learned)) < len(learned)) == (name in ("pacs", "core50", "domainnet"))
    seen: set[object] = set()
    for experience in stream.experiences:
        assert experience.train.labels == experience.test.labels == stream.labels
        train_classes, test_classes = set(experience.train.targets.tolist()), set(experience.test.targets.tolist())
        assert train_classes == test_classes == set(experience.classes)
        train, test = set(identities(experience.train)), set(identities(experience.test))
        assert len(train) == len(experience.train)
        assert not train & test
        assert not train & seen
        seen |= train if name == "core50" else train | test  # CORe50 tests every session on the same images


@pytest.mark.parametrize("name", MISSING)
def test_the_error_for_a_missing_torchvision_dataset_says_where_to_get_and_put_it(name: str, tmp_path: Path) -> None:
    cifar = "cifar10 " if name == "five-datasets" else "cifar100 "
    folder = "cifar-10-batches-py/" if name == "five-datasets" else "cifar-100-python/"
    with pytest.raises(DataError) as caught:
        build_stream(read_config(name), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{cifar}was not found in {str(tmp_path)!r} (")
    assert f"Put the unpacked {folder} there, from https://www.cs.toronto.edu/~kriz/" in message
    assert message.endswith("pass --data FOLDER or set `root` in the YAML file, or pass --download.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"source": "torchvision", "dataset": "svhn"},
            "Put train_32x32.mat and test_32x32.mat there, from http://ufldl",
        ),
        (
            {"source": "torchvision", "dataset": "fashion_mnist"},
            "Put FashionMNIST/raw/ with its four unpacked files there",
        ),
        ({"source": "cub200"}, "Put the unpacked CUB_200_2011/ there, from https://data.caltech.edu/"),
        ({"source": "core50", "scenario": "nc"}, "Put the unpacked core50_128x128/ and batches_filelists/ there, from"),
        (
            {"source": "split", "root": "birds", "address": "https://birds.org"},
            "The images are available from https://birds.org.",
        ),
        ({"source": "folders", "sets": ["a", "b"]}, "Put dataset 'a' there, with class folders or with train/ and "),
    ],
)
def test_missing_images_are_reported_with_instructions(values: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        build(values, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "--data FOLDER or set `root`" in str(caught.value)


def test_a_seed_orders_classes_as_other_benchmarks_do() -> None:
    labels = tuple(map(str, range(100)))
    paths = [Path(f"{i}.jpg") for i in range(100)]
    images = LabelledImages("x", labels, torch.arange(100), paths)
    stream = by_class("own", ImageSet("x", images, images), 10, 1993)
    assert stream.labels[:5] == ("68", "56", "78", "8", "23")
    first = stream.experiences[0]
    assert first.classes == tuple(range(10))
    assert [stream.labels[t] for t in first.train.targets.tolist()] == [path.stem for path in first.train.items]


def test_classes_follow_the_order_of_a_list(tmp_path: Path) -> None:
    put_splits(tmp_path / "x", ["a", "b", "c", "d"])
    order = ["d", "a", "b", "c"]
    stream = build({"source": "split", "root": "x", "num_experiences": 2, "class_order": order}, tmp_path)
    assert stream.labels == tuple(order)
    assert {path.parent.name for path in stream.experiences[0].train.items} == {"d", "a"}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["a", "b"], "it lacks 'c', 'd'."),
        (["a", "b", "c", "e"], "it lacks 'd' and has unknown 'e'."),
        (["a", "b", "c", "d", "a"], "it repeats a class."),
    ],
)
def test_an_invalid_class_order_is_refused(order: list[str], message: str, tmp_path: Path) -> None:
    put_splits(tmp_path / "x", ["a", "b", "c", "d"])
    with pytest.raises(DataError, match=re.escape(f"`class_order` must list each class of 'x' once; {message}")):
        build({"source": "split", "root": "x", "num_experiences": 2, "class_order": order}, tmp_path)


@pytest.mark.parametrize(
    ("num_classes", "settings", "message"),
    [
        (8, {"num_experiences": 3}, "The 8 classes of 'x' do not divide evenly into 3 experiences of at least two "
         "classes. Use 2, 4 equal experiences (--split), or `first: 2`."),
        (9, {"num_experiences": 2, "first": 8}, "The 9 classes of 'x', 8 in the first, do not"),
        (7, {"num_experiences": 5},
         "Use up to 3 experiences with `first`, the size of the first one, in a YAML file."),
        (3, {"num_experiences": 2}, "Use a dataset with at least four classes."),
        (4, {"num_experiences": 2, "first": 4}, "Use 2 equal experiences (--split), or `first: 2`."),
    ],
)  # fmt: skip
def test_classes_that_do_not_divide_evenly_are_refused_with_what_fits(
    num_classes: int, settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    put_splits(tmp_path / "x", num_classes)
    with pytest.raises(DataError, match=re.escape(message)):
        build({"source": "split", "root": "x", **settings}, tmp_path)


def test_the_other_experiences_share_the_classes_that_the_first_leaves(tmp_path: Path) -> None:
    put_splits(tmp_path / "x", 8)
    stream = build({"source": "split", "root": "x", "num_experiences": 3, "first": 4}, tmp_path)
    assert [experience.classes for experience in stream.experiences] == [(0, 1, 2, 3), (4, 5), (6, 7)]


def test_a_limit_is_balanced_over_classes_as_far_as_they_go(tmp_path: Path) -> None:
    put_splits(tmp_path / "x", ["a", "b", "c", "d"], 20)
    for number in range(3, 20):
        (tmp_path / "x" / "train" / "b" / f"{number}.jpg").unlink()
    values = {"source": "split", "root": "x", "num_experiences": 2}
    unlimited = build(values, tmp_path)
    stream = build(values, tmp_path, limit=10, test_limit=2)
    first, second = stream.experiences
    assert first.train.counts == [7, 3, 0, 0]
    assert second.train.counts == [0, 0, 5, 5]
    assert second.test.counts == [0, 0, 1, 1]
    assert set(second.train.items) < set(unlimited.experiences[1].train.items)
    assert [path.parent.name for path in second.train.items] == ["c"] * 5 + ["d"] * 5


def test_a_limit_draws_with_the_seed(tmp_path: Path) -> None:
    put_splits(tmp_path / "cifar10", 10, 12)
    config = read_config("split-cifar10", {"limit": 10})
    drawn = [build_stream(config, tmp_path, seed).experiences[0].train.items for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 3}, "`limit` of 3 images is too small for experience 'own-1'; its classes need at least 4."),
        (
            {"test_limit": 1},
            "`test_limit` of 1 images is too small for experience 'own-1'; its classes need at least 2.",
        ),
    ],
)
def test_a_limit_that_is_too_small_for_the_classes_is_refused(
    settings: dict[str, int], message: str, tmp_path: Path
) -> None:
    put_splits(tmp_path / "x", 4)
    with pytest.raises(DataError, match=re.escape(message)):
        build({"source": "split", "root": "x", "num_experiences": 2}, tmp_path, **settings)


def test_without_a_test_split_a_fifth_of_each_class_is_held_out_by_the_seed(tmp_path: Path) -> None:
    put(tmp_path / "x", 3, 20)
    held_out = [open_folder(tmp_path / "x", seed, None).test for seed in (0, 0, 1)]
    assert held_out[0].counts == [4, 4, 4]
    assert held_out[0].items == held_out[1].items != held_out[2].items


def test_any_folder_of_class_folders_is_a_stream(tmp_path: Path) -> None:
    put(tmp_path / "My Birds!", 6, 10)
    stream = build_stream(read_config(tmp_path / "My Birds!", {"data": {"num_experiences": 3}}))
    assert stream.name == "my-birds"
    assert [experience.name for experience in stream.experiences] == ["my-birds-1", "my-birds-2", "my-birds-3"]
    assert [experience.classes for experience in stream.experiences] == [(0, 1), (2, 3), (4, 5)]
    assert [(len(experience.train), len(experience.test)) for experience in stream.experiences] == [(16, 4)] * 3


def test_a_torchvision_dataset_is_split_by_class_with_its_own_images(tmp_path: Path) -> None:
    put_mnist(tmp_path)
    stream = build({"source": "torchvision", "dataset": "mnist", "class_order": 1993}, tmp_path)
    order = np.random.RandomState(1993).permutation(10).tolist()
    assert [label[0] for label in stream.labels] == list(map(str, order))
    number = 0
    for experience in stream.experiences:
        for images, count in ((experience.train, 12), (experience.test, 4)):
            assert len(images) == count
            for i in range(count):
                picture = images.item(i).picture()
                assert isinstance(picture, Image.Image)
                assert picture.getpixel((0, 0))[0] % 10 == order[images.targets[i]]
                number += 1
    assert number == 80


def test_core50_of_new_classes_tests_each_experience_on_its_own(tmp_path: Path) -> None:
    put_core50(tmp_path)
    stream = build({"source": "core50", "scenario": "nc"}, tmp_path)
    assert len(stream.experiences) == 9
    assert stream.labels == ("o1", "o3", "o2", "o4")
    for number, experience in enumerate(stream.experiences[:2]):
        folders = {path.parent.name for path in experience.test.items}
        assert folders == {path.parent.name for path in experience.train.items} == [{"o1", "o3"}, {"o2", "o4"}][number]


def test_cub200_gives_full_images_as_files_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_cub200(tmp_path)
    images = build_stream(read_config("cub200-10"), tmp_path).experiences[0].train
    assert capsys.readouterr().out == ""
    assert len(images) == 60
    for path, target in zip(images.items, images.targets.tolist(), strict=True):
        assert path.is_file()
        assert path.parent.name == images.labels[target]


def test_equal_names_are_one_class_only_with_shared_labels(tmp_path: Path) -> None:
    put_splits(tmp_path / "a", ["cat", "dog"])
    put_splits(tmp_path / "b", ["bird", "cat"])
    values = {"source": "folders", "sets": ["a", "b"]}
    assert build(values, tmp_path).labels == ("a/cat", "a/dog", "b/bird", "b/cat")
    shared = build({**values, "shared_labels": True}, tmp_path)
    assert shared.labels == ("cat", "dog", "bird")
    assert [experience.classes for experience in shared.experiences] == [(0, 1), (0, 2)]
    assert shared.experiences[1].train.targets.tolist() == [2] * 4 + [0] * 4


def test_two_datasets_with_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one/birds", "two/birds"):
        put_splits(tmp_path / folder, 2)
    with pytest.raises(DataError, match=r"Stream 'own' has two datasets named 'birds'\. Rename one of the folders"):
        build({"source": "folders", "sets": ["one/birds", "two/birds"]}, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it must have a path and a number per line."),
        ("no number\nat all here\n", "must have a path and a number per line"),
        ("clipart/c000/99.jpg 0\n", "99.jpg', which does not exist."),
        ("clipart/other/0.jpg 0\n", "has class 'other', which "),
    ],
)
def test_an_invalid_file_list_is_refused(text: str, message: str, tmp_path: Path) -> None:
    put_domainnet(tmp_path)
    put(tmp_path / "domainnet" / "clipart" / "x", ["other"])
    (tmp_path / "domainnet" / "clipart" / "other").symlink_to(tmp_path / "domainnet" / "clipart" / "x" / "other")
    (tmp_path / "domainnet" / "clipart_test.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        build_stream(read_config("domainnet"), tmp_path)


def test_a_missing_file_list_is_named(tmp_path: Path) -> None:
    put_core50(tmp_path)
    (tmp_path / "core50" / "batches_filelists" / "NI_inc" / "run0" / "test_filelist.txt").unlink()
    with pytest.raises(DataError, match=r"File list .*test_filelist.txt' cannot be read: No such file"):
        build_stream(read_config("core50"), tmp_path)


def test_a_relative_root_is_resolved_against_the_yaml_file_or_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_splits(tmp_path / "here" / "x", 4)
    put_splits(tmp_path / "there" / "x", 6)
    file = tmp_path / "here" / "own.yaml"
    file.write_text("name: own\ndata: {source: split, root: x, num_experiences: 2}\n")
    monkeypatch.chdir(tmp_path)
    config = read_config("here/own.yaml")
    assert len(build_stream(config).labels) == 4
    assert len(build_stream(config, tmp_path / "there").labels) == 6
    packaged = read_config("split-cifar10")
    with pytest.raises(DataError, match=re.escape(f"There is no folder {str(tmp_path / 'cifar10')!r}.")):
        build_stream(packaged)


def test_overrides_replace_single_settings_of_the_file() -> None:
    overrides = {"seeds": 1, "limit": None, "backbone": {"weights": "tiny.safetensors"}, "learn": {"epochs": 2}}
    config = read_config("pacs", overrides)
    assert config.seeds == 1
    assert config.limit is None
    assert config.backbone.name == "vit_tiny_patch16_224"
    assert config.backbone.mean == (0.5, 0.5, 0.5)
    assert config.backbone.weights == Path("tiny.safetensors")
    assert config.learn == {"epochs": 2}
    assert read_config("pacs") == read_config("pacs", {"seeds": None})


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("digits", {"jobs": 1, "download": True, "limit": None, "backbone": {"weights": None}}, True),
        ("digits", {"methods": ["addenda", "slda"]}, True),
        ("digits", {"methods": ["slda"]}, False),
        ("digits", {"limit": 20}, False),
        ("digits", {"seeds": 2}, False),
        ("digits", {"backbone": {"weights": "other.safetensors"}}, False),
        ("pacs", {"limit": 100, "test_limit": 80, "backbone": {"weights": "tiny.safetensors"}}, True),
        ("pacs", {"backbone": {"weights": "tiny.safetensors"}}, False),
    ],
)
def test_results_are_expected_only_with_the_settings_of_the_reference_run(
    name: str, overrides: dict[str, object], expected: bool
) -> None:
    assert bool(read_config(name, overrides).expected) is expected


@pytest.mark.parametrize("name", ["digits", "mixed", "pacs", "split-cifar10"])
def test_expected_results_are_those_on_record(name: str) -> None:
    record = json.loads((ROOT / "docs" / "results" / "continual.json").read_text())[name]
    expected = yaml.safe_load((STREAMS / f"{name}.yaml").read_text())["expected"]
    for key, value in expected.items():
        setting, _, metric = key.rpartition("incremental_")
        cells = [
            cell[f"{setting}incremental_metrics"][metric] for cell in record["cells"] if cell["method"] == "addenda"
        ]
        assert value == round(100 * sum(cells) / len(cells), 1)


def test_all_configuration_errors_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "name: Own Stream\n"
        "seed: 3\n"
        "limit: 0\n"
        "methods: []\n"
        "expected: {accuracy: high}\n"
        "backbone: {nam: x, mean: [0.5]}\n"
        "learn: {epoch: 3}\n"
        "data: {source: split, num_experiences: 1, first: 1, class_order: backwards}\n"
    )
    with pytest.raises(DataError) as caught:
        read_config(file)
    message = str(caught.value)
    assert message.startswith(f"The configuration of stream {str(file)!r} is invalid:\n  ")
    assert "Value error" not in message
    for problem in (
        "name: use at most 40 lower-case letters, digits, '-' and '_', and start with a letter or digit",
        "seed: unknown setting",
        "limit: Input should be greater than or equal to 1",
        "methods: List should have at least 1 item",
        "expected.accuracy: Input should be a valid number",
        "backbone.nam: unknown setting",
        "backbone.mean.1: is missing",
        "learn: The configuration is not valid: epoch: there is no such setting.",
        "data.root: is missing",
        "data.num_experiences: Input should be greater than or equal to 2",
        "data.first: Input should be greater than or equal to 2",
        "data.class_order: give 'sorted', a seed, or a list of at least two class names",
    ):
        assert f"\n  {problem}" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{root: x}", "data: `source` is missing"),
        ("{source: web}", "data: `source` is 'web'; it must be one of 'digits', 'folders', 'split'"),
        ("{source: folders, sets: [a]}", "data.sets: List should have at least 2 items"),
        ("{source: core50, scenario: nic, run: 10}", "data.scenario: Input should be 'ni' or 'nc'"),
        ("{source: digits, root: x}", "data.root: unknown setting"),
    ],
)
def test_an_invalid_data_section_is_refused(data: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text(f"name: own\ndata: {data}\n")
    with pytest.raises(DataError, match=re.escape(message)):
        read_config(tmp_path / "own.yml")


def test_an_unknown_stream_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError) as caught:
        read_config("digit")
    assert str(caught.value).startswith("There is no stream 'digit'. Known: core50, cub200-10, digits, ")
    assert str(caught.value).endswith("give a YAML file, or a folder with one subfolder of images per class.")


def test_a_missing_yaml_file_is_named() -> None:
    with pytest.raises(DataError, match=r"The file 'gone.yaml' cannot be read: No such file"):
        read_config("gone.yaml")


def test_a_stream_of_files_and_one_of_a_dataset_become_avalanche_benchmarks(tmp_path: Path) -> None:
    colour_folder(tmp_path / "x" / "train", 4, ("red", "green", "blue", "grey"))
    colour_folder(tmp_path / "x" / "test", 2, ("red", "green", "blue", "grey"))
    put_mnist(tmp_path)
    streams = [
        build({"source": "split", "root": "x", "num_experiences": 2}, tmp_path),
        build({"source": "torchvision", "dataset": "mnist", "num_experiences": 2}, tmp_path),
    ]
    for stream in streams:
        benchmark = stream.benchmark(None, lambda image: torch.tensor(image.size))
        assert [len(e.dataset) for e in benchmark.train_stream] == [len(e.train) for e in stream.experiences]
        picture, target, task = benchmark.train_stream[1].dataset[0]
        assert isinstance(picture, Image.Image)
        assert (target, task) == (stream.experiences[1].classes[0], 1)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "num_classes"), [("split-cifar10", 10), ("pacs", 7), ("mixed", 43)])
def test_a_stream_of_real_images_is_built_and_read(name: str, num_classes: int) -> None:
    stream = build_stream(read_config(name, {"limit": 100, "test_limit": 50}), SHARED / "images")
    assert len(stream.labels) == num_classes
    for experience in stream.experiences:
        assert (len(experience.train), len(experience.test)) == (100, 50)
        assert isinstance(experience.train.item(0).picture(), Image.Image)
        counts = experience.train.counts
        assert max(counts) - min(counts[number] for number in experience.classes) <= 1
