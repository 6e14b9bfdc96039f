"""Groups of images are never divided by a split, are part of the fingerprint, and are warned of if not declared."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from PIL import Image

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError, TrainingError
from addenda.learner.data import LabelledImages, open_images
from addenda.learner.learning_run import near_duplicates
from addenda.learner.objectives import MultiLabel, SingleLabel
from tests.support.images import colour_folder

CONFIG = LearnConfig(head_only=True)
VIDEOS, FRAMES = 6, 4


def videos(folder: Path, frames: int = FRAMES) -> Path:
    """Draws frames of videos; each video is an image of noise that gets brighter from frame to frame."""
    random = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        for video in range(VIDEOS):
            picture = torch.randint(0, 200, (40, 40, 3), generator=random, dtype=torch.uint8)
            picture[..., label == "dog"] //= 2
            # With one name in both classes, the videos would be taken for the classes.
            film = folder / label / f"{label}-video{video}"
            film.mkdir(parents=True)
            for frame in range(frames):
                image = Image.fromarray((picture + frame).numpy())
                image.save(film / f"{frame}.png")
    return folder


def listing(folder: Path, columns: tuple[str, ...] = ("path", "label", "group"), reverse: bool = False) -> Path:
    """Lists the same images in a CSV file, grouped by their video."""
    file = folder.with_suffix(".csv")
    paths = sorted(folder.rglob("*.png"), reverse=reverse)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        for path in paths:
            label, video, _ = path.relative_to(folder).parts
            name = path.relative_to(file.parent)
            writer.writerow({"path": name, "label": label, "group": video, "split": "train"})
    return file


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    return videos(tmp_path / "frames")


@pytest.mark.parametrize("objective", [SingleLabel(), MultiLabel()])
@pytest.mark.parametrize("seed", range(4))
def test_a_split_does_not_divide_a_group(objective: SingleLabel | MultiLabel, seed: int) -> None:
    classes = torch.arange(120) % 3
    groups = [f"{row // 12} {classes[row]}" for row in range(120)]
    targets = torch.eye(3)[classes].bool() if isinstance(objective, MultiLabel) else classes
    train, validation = objective.split(targets, 3, 0.2, seed, groups)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(120))
    assert not {groups[row] for row in train} & {groups[row] for row in validation}
    assert 0.1 < len(validation) / 120 < 0.3
    if isinstance(objective, SingleLabel):
        assert classes[validation].unique().tolist() == [0, 1, 2]


def test_a_class_of_one_group_is_in_the_training_split_only() -> None:
    classes = torch.tensor([0] * 20 + [1] * 5)
    groups = [f"a{row // 4}" for row in range(20)] + ["b"] * 5
    for seed in range(5):
        train, validation = SingleLabel().split(classes, 2, 0.2, seed, groups)
        assert set(range(20, 25)) <= set(train.tolist())
        assert len(validation) == 4


def test_a_label_of_one_group_is_in_the_training_split_of_a_multi_label_task() -> None:
    targets = torch.ones(25, 2, dtype=torch.bool)
    targets[:20, 1] = False
    groups = [f"a{row // 4}" for row in range(20)] + ["b"] * 5
    for seed in range(10):
        train, _ = MultiLabel().split(targets, 2, 0.2, seed, groups)
        assert targets[train].any(0).all()


def test_groups_of_which_none_can_be_held_out_are_refused() -> None:
    with pytest.raises(DataError, match="The images form 2 groups, and none can be held out for validation"):
        SingleLabel().split(torch.tensor([0] * 5 + [1] * 5), 2, 0.2, 0, ["a"] * 5 + ["b"] * 5)


def test_a_group_that_can_be_held_out_is_found_in_any_fold() -> None:
    groups = ["only"] * 3 + [f"p{row // 3}" for row in range(9)]
    for classes in (torch.tensor([0] * 3 + [1] * 9), torch.tensor([1] * 3 + [0] * 9)):
        for seed in range(6):
            train, validation = SingleLabel().split(classes, 2, 0.2, seed, groups)
            assert set(range(3)) <= set(train.tolist())
            assert len({groups[row] for row in validation.tolist()}) == 1


def test_two_groups_are_enough(frames: Path, tiny: FrozenBackbone, registry: Registry) -> None:
    files = sorted(frames.rglob("*.png"))
    file = frames.with_suffix(".csv")
    sides = [f"{path.relative_to(file.parent)},{path.parts[-3]},side{path.parts[-2][-1] < '3'}" for path in files]
    file.write_text("path,label,group\n" + "\n".join(sides))
    task = Learner(tiny, registry).learn("sides", file, config=CONFIG)
    assert task.metrics["validation"]["num_images"] == 24
    assert task.layer_weight is not None


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_group_by_compares_names_in_one_unicode_form(tmp_path: Path, form: str) -> None:
    folder = colour_folder(tmp_path / "data")
    for label in ("red", "green", "blue"):
        for path in sorted((folder / label).iterdir()):
            path.rename(path.with_name(normalize(form, f"caf\xe9{int(path.stem) // 2}_{path.name}")))
    groups = open_images(folder).grouped_by("(caf\xe9.)_").groups
    assert groups is not None
    assert set(groups) == {f"caf\xe9{number}" for number in range(4)}


def test_a_listings_groups_are_kept_together_and_are_part_of_its_fingerprint(frames: Path) -> None:
    images = open_images(listing(frames)).hashed()
    assert images.groups is not None
    by_video = {group: [] for group in images.groups}
    for row, group in enumerate(images.groups):
        by_video[group].append(row)
    assert len(by_video) == 2 * VIDEOS
    assert {len(rows) for rows in by_video.values()} == {FRAMES}
    again = open_images(listing(frames, reverse=True)).hashed()
    assert (again.fingerprint(), again.groups) == (images.fingerprint(), images.groups)
    without = open_images(listing(frames, ("path", "label"))).hashed()
    assert without.groups is None
    assert without.fingerprint() != images.fingerprint()


def test_group_by_finds_the_group_in_the_files_path(frames: Path) -> None:
    images = open_images(frames)
    by_match = images.grouped_by(r"\w+-video\d")
    assert by_match.groups is not None
    assert by_match.groups[0] == "cat-video0"
    by_group = images.grouped_by(r"^(cat|dog)/\w+-video\d/\d\.png$")
    assert set(by_group.groups or ()) == {"cat", "dog"}
    assert images.grouped_by(r"(video)?\d/").groups == ("video",) * len(images)
    listed = open_images(listing(frames, ("path", "label"))).grouped_by(r"^frames/\w+/(.+)/")
    assert listed.groups == open_images(listing(frames)).groups


def test_an_image_without_a_group_is_one_of_its_own(frames: Path, tiny: FrozenBackbone, registry: Registry) -> None:
    images = open_images(frames).grouped_by(r"(video0)|png")
    assert set(images.groups or ()) == {"", "video0"}
    task = Learner(tiny, registry).learn("any", frames, config=LearnConfig(head_only=True, group_by=r"(video0)|png"))
    assert task.metrics["validation"]["num_images"] > 2


def test_images_that_cannot_be_grouped_are_refused(frames: Path, tiny: FrozenBackbone, registry: Registry) -> None:
    learner = Learner(tiny, registry)
    with pytest.raises(DataError, match=r"group_by 'film' does not match the paths of 48 of 48 images"):
        learner.learn("any", frames, config=LearnConfig(group_by="film"))
    with pytest.raises(DataError, match="already has a column 'group'"):
        learner.learn("any", listing(frames), config=LearnConfig(group_by="video"))
    data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 32, 32), torch.arange(8) % 2)
    with pytest.raises(DataError, match="group_by matches the paths of image files"):
        learner.learn("any", data, config=LearnConfig(group_by="video"))
    with pytest.raises(TrainingError, match=r"group_by: .*'\(video' is not a valid regular expression"):
        LearnConfig.parse({"group_by": "(video"})
    file = listing(frames)
    file.write_text(file.read_text() + "frames/cat/cat-video0/0.png,cat,other\n")
    with pytest.raises(DataError, match="is also on line 2, in another group"):
        open_images(file)


def test_a_split_that_divides_videos_is_warned_of_and_a_grouped_one_is_not(
    frames: Path, tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(tiny, registry)
    with caplog.at_level(logging.WARNING):
        split = learner.learn("split", frames, config=CONFIG)
    assert split.data["near_duplicates"] == split.metrics["validation"]["num_images"] == 10
    assert "Near-duplicates of 10 of 10 validation images are among the training images" in caplog.text
    assert "--group-by" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config = LearnConfig(head_only=True, group_by=r"\w+-video\d")
        grouped = learner.learn("grouped", frames, config=config)
    assert grouped.data["near_duplicates"] == 0
    assert grouped.metrics["validation"]["num_images"] % FRAMES == 0
    assert "near-duplicates" not in caplog.text.lower()
    assert grouped.data["run"] != split.data["run"]


def test_the_folds_that_choose_the_probe_keep_groups_together(
    frames: Path, tiny: FrozenBackbone, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []  # number of images, and whether no group was divided
    folds = SingleLabel.folds

    def spy(self: SingleLabel, targets: torch.Tensor, seed: int, groups: list[str] | None = None, count: int = 5):
        fold = folds(self, targets, seed, groups, count)
        assert groups is not None
        calls.append((len(targets), len(set(zip(groups, fold.tolist(), strict=True))) == len(set(groups))))
        return fold

    monkeypatch.setattr(SingleLabel, "folds", spy)
    Learner(tiny, registry).learn("any", listing(frames), config=CONFIG)
    assert len(calls) == 2  # the strength of the linear probe, and the layer probe on the training split
    assert calls[0] == (48, True)
    assert calls[1][0] < 48
    assert calls[1][1]


def test_a_class_whose_images_are_one_group_is_warned_of(
    tmp_path: Path, tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    folder = videos(tmp_path / "frames")
    config = LearnConfig(head_only=True, group_by=r"(cat-video\d|dog)")
    with caplog.at_level(logging.WARNING):
        task = Learner(tiny, registry).learn("any", folder, config=config)
    assert "The validation split has no image of 'dog': all images of a class are in one group." in caplog.text
    assert task.metrics["validation"]["per_class"]["dog"] is None


def test_only_near_images_count_as_near_duplicates() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(40, 500, generator=random)
    classes, train, validation = torch.arange(40) % 2, torch.arange(30), torch.arange(30, 40)
    features += 20 * classes[:, None]
    assert near_duplicates(features, classes, train, validation) == 0
    features[30:34] = features[:4] + 0.2 * torch.randn(4, 500, generator=random)
    assert near_duplicates(features, classes, train, validation) == 4
    assert near_duplicates(torch.ones(40, 5), classes, train, validation) == 0  # constant features


def test_a_class_of_one_image_is_not_said_to_be_in_one_group(
    tmp_path: Path, tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    folder = videos(tmp_path / "frames")
    (folder / "ant").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "ant" / "1.png")
    with caplog.at_level(logging.WARNING):
        Learner(tiny, registry).learn("any", folder, config=LearnConfig(head_only=True, group_by=r"(\w+-video\d|ant)"))
    assert "The validation split has no image of 'ant': a class has a single image." in caplog.text


def test_a_class_in_groups_that_other_classes_need_is_warned_of(
    tmp_path: Path, tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    folder = colour_folder(tmp_path / "data")
    groups = {"red": "aaaa", "green": "aabb", "blue": "bbbb"}  # green images are in both groups
    rows = [f"data/{label}/{i}.png,{label},{group}" for label, of in groups.items() for i, group in enumerate(of)]
    for i, group in enumerate("ccdd"):
        Image.new("RGB", (40, 40), (9, 9, i)).save(folder / f"{i}.png")
        rows.append(f"data/{i}.png,grey,{group}")
    file = tmp_path / "data.csv"
    file.write_text("\n".join(["path,label,group", *rows]))
    with caplog.at_level(logging.WARNING):
        Learner(tiny, registry).learn("any", file, config=CONFIG)
    assert (
        "The validation split has no image of 'blue', 'green', 'red': all images of a class are in one group; "
        in caplog.text
    )
    assert "training needs all images of a class because of other classes." in caplog.text


def test_images_with_a_twin_are_found_among_all_training_images() -> None:
    random = torch.Generator().manual_seed(0)
    base = torch.randn(3000, 32, generator=random).repeat(2, 1)
    features = base + 0.1 * torch.randn(6000, 32, generator=random)
    train, validation = torch.arange(5000), torch.arange(5000, 6000)
    assert near_duplicates(features, torch.zeros(6000, dtype=torch.int64), train, validation) == 1000


def test_copies_are_found_if_each_class_has_one_training_image() -> None:
    features = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    classes = torch.arange(20).repeat(2)
    assert near_duplicates(features, classes, torch.arange(20), torch.arange(20, 40)) == 20


def test_the_distance_within_a_class_does_not_depend_on_its_number_of_images() -> None:
    random = torch.Generator().manual_seed(0)
    pictures = torch.randn(200, 400, generator=random)
    features = torch.cat([pictures, pictures + 0.55 * torch.randn(200, 400, generator=random)])  # at 0.15 of it
    for size in (2, 3, 50):
        classes = (torch.arange(200) // size).repeat(2)
        assert near_duplicates(features, classes, torch.arange(200), torch.arange(200, 400)) == 200


@pytest.mark.parametrize("value", [0.1, 1.0, 1e6 / 3])
def test_a_constant_feature_hides_no_copy(value: float) -> None:
    features = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    features[:, 0] = value
    assert near_duplicates(features, torch.arange(200) % 5, torch.arange(100), torch.arange(100, 200)) == 100


def test_selected_images_keep_their_groups(frames: Path) -> None:
    images = open_images(frames).grouped_by(r"\w+-video\d")
    selected = images.select([5, 40, 3])
    assert isinstance(selected, LabelledImages)
    assert selected.groups == tuple((images.groups or ())[row] for row in (5, 40, 3))
