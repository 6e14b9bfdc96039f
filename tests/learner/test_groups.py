"""Images that belong together: on one side of every split, part of the fingerprint, and missed where nobody said so."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from addenda import FrozenBackbone, LearnConfig, Learner, Registry
from addenda.exceptions import DataError, TrainingError
from addenda.learner.data import LabelledImages, open_images
from addenda.learner.learning_run import near_duplicates
from addenda.learner.objectives import MultiLabel, SingleLabel

CONFIG = LearnConfig(head_only=True)
VIDEOS, FRAMES = 6, 4


def videos(folder: Path, frames: int = FRAMES) -> Path:
    """Frames of videos: each is a picture of noise, a little brighter from frame to frame."""
    random = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        for video in range(VIDEOS):
            picture = torch.randint(0, 200, (40, 40, 3), generator=random, dtype=torch.uint8)
            picture[..., label == "dog"] //= 2
            film = (
                folder / label / f"{label}-video{video}"
            )  # of one name in two classes, they would seem to be the classes
            film.mkdir(parents=True)
            for frame in range(frames):
                image = Image.fromarray((picture + frame).numpy())
                image.save(film / f"{frame}.png")
    return folder


def listing(folder: Path, columns: tuple[str, ...] = ("path", "label", "group"), reverse: bool = False) -> Path:
    """The same images in a listing, grouped by their video."""
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
def test_a_group_stands_on_one_side_of_the_split(objective: SingleLabel | MultiLabel, seed: int) -> None:
    classes = torch.arange(120) % 3
    groups = [f"{row // 12} {classes[row]}" for row in range(120)]
    targets = torch.eye(3)[classes].bool() if isinstance(objective, MultiLabel) else classes
    train, validation = objective.split(targets, 3, 0.2, seed, groups)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(120))
    assert not {groups[row] for row in train} & {groups[row] for row in validation}
    assert 0.1 < len(validation) / 120 < 0.3
    if isinstance(objective, SingleLabel):
        assert classes[validation].unique().tolist() == [0, 1, 2]


def test_a_class_of_one_group_is_learned_from_and_not_validated() -> None:
    classes = torch.tensor([0] * 20 + [1] * 5)
    groups = [f"a{row // 4}" for row in range(20)] + ["b"] * 5
    for seed in range(5):
        train, validation = SingleLabel().split(classes, 2, 0.2, seed, groups)
        assert set(range(20, 25)) <= set(train.tolist())
        assert len(validation) == 4


def test_a_label_of_one_group_is_learned_from_where_images_have_several() -> None:
    targets = torch.ones(25, 2, dtype=torch.bool)
    targets[:20, 1] = False
    groups = [f"a{row // 4}" for row in range(20)] + ["b"] * 5
    seeds = range(10)
    assert any((MultiLabel().folds(targets, seed, groups)[20] == 0).item() for seed in seeds)  # else nothing is tested
    for seed in seeds:
        train, _ = MultiLabel().split(targets, 2, 0.2, seed, groups)
        assert targets[train].any(0).all()


def test_groups_of_which_none_can_be_held_out_are_refused() -> None:
    with pytest.raises(DataError, match="The images form 2 groups, and none can be held out for validation"):
        SingleLabel().split(torch.tensor([0] * 5 + [1] * 5), 2, 0.2, 0, ["a"] * 5 + ["b"] * 5)


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
    whole = images.grouped_by(r"\w+-video\d")
    assert whole.groups is not None
    assert whole.groups[0] == "cat-video0"
    named = images.grouped_by(r"^(cat|dog)/\w+-video\d/\d\.png$")
    assert set(named.groups or ()) == {"cat", "dog"}
    assert images.grouped_by(r"(video)?\d/").groups == ("video",) * len(images)
    listed = open_images(listing(frames, ("path", "label"))).grouped_by(r"^frames/\w+/(.+)/")
    assert listed.groups == open_images(listing(frames)).groups


def test_an_image_without_a_group_is_one_of_its_own(frames: Path, tiny: FrozenBackbone, registry: Registry) -> None:
    images = open_images(frames).grouped_by(r"(video0)|png")
    assert set(images.groups or ()) == {"", "video0"}
    task = Learner(tiny, registry).learn("any", frames, config=LearnConfig(head_only=True, group_by=r"(video0)|png"))
    assert task.metrics["validation"]["num_images"] > 2


def test_what_cannot_be_grouped_is_refused(frames: Path, tiny: FrozenBackbone, registry: Registry) -> None:
    learner = Learner(tiny, registry)
    with pytest.raises(DataError, match=r"group_by 'film' does not match the paths of 48 of 48 images"):
        learner.learn("any", frames, config=LearnConfig(group_by="film"))
    with pytest.raises(DataError, match="already has a column 'group'"):
        learner.learn("any", listing(frames), config=LearnConfig(group_by="video"))
    data = torch.utils.data.TensorDataset(torch.zeros(8, 3, 32, 32), torch.arange(8) % 2)
    with pytest.raises(DataError, match="group_by matches the paths of image files"):
        learner.learn("any", data, config=LearnConfig(group_by="video"))
    with pytest.raises(TrainingError, match=r"group_by: .*'\(video' is no regular expression"):
        LearnConfig.parse({"group_by": "(video"})
    file = listing(frames)
    file.write_text(file.read_text() + "frames/cat/cat-video0/0.png,cat,other\n")
    with pytest.raises(DataError, match="is also on line 2, in another group"):
        open_images(file)


def test_frames_that_were_split_are_warned_of_and_grouped_are_not(
    frames: Path, tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(tiny, registry)
    with caplog.at_level(logging.WARNING):
        split = learner.learn("split", frames, config=CONFIG)
    assert split.data["near_duplicates"] == split.metrics["validation"]["num_images"] == 10
    assert "10 of 10 validation images have near-duplicates among the images learned from" in caplog.text
    assert "--group-by" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        config = LearnConfig(head_only=True, group_by=r"\w+-video\d")
        grouped = learner.learn("grouped", frames, config=config)
    assert grouped.data["near_duplicates"] == 0
    assert grouped.metrics["validation"]["num_images"] % FRAMES == 0
    assert "near-duplicates" not in caplog.text
    assert grouped.data["run"] != split.data["run"]


def test_the_folds_that_choose_the_probe_keep_groups_together(
    frames: Path, tiny: FrozenBackbone, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[tuple[int, bool]] = []
    folds = SingleLabel.folds

    def noted(self: SingleLabel, targets: torch.Tensor, seed: int, groups: list[str] | None = None, count: int = 5):
        fold = folds(self, targets, seed, groups, count)
        assert groups is not None
        dealt.append((len(targets), len(set(zip(groups, fold.tolist(), strict=True))) == len(set(groups))))
        return fold

    monkeypatch.setattr(SingleLabel, "folds", noted)
    Learner(tiny, registry).learn("any", listing(frames), config=CONFIG)
    assert len(dealt) == 3  # the split, the strength of the linear probe, and the layer probe on the training part
    assert dealt[0] == dealt[1] == (48, True)
    assert dealt[2][0] < 48
    assert dealt[2][1]


def test_a_class_whose_images_are_one_group_is_told_of(
    tmp_path: Path, tiny: FrozenBackbone, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    folder = videos(tmp_path / "frames")
    config = LearnConfig(head_only=True, group_by=r"(cat-video\d|dog)")
    with caplog.at_level(logging.WARNING):
        task = Learner(tiny, registry).learn("any", folder, config=config)
    assert "No image of 'dog' was held out" in caplog.text
    assert task.metrics["validation"]["per_class"]["dog"] is None


def test_only_what_is_near_counts_as_a_near_duplicate() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(40, 500, generator=random)
    classes, train, validation = torch.arange(40) % 2, torch.arange(30), torch.arange(30, 40)
    features += 20 * classes[:, None]
    assert near_duplicates(features, classes, train, validation) == 0
    features[30:34] = features[:4] + 0.2 * torch.randn(4, 500, generator=random)
    assert near_duplicates(features, classes, train, validation) == 4
    assert near_duplicates(torch.ones(40, 5), classes, train, validation) == 0  # constant features tell nothing


def test_groups_go_with_their_images_wherever_those_go(frames: Path) -> None:
    images = open_images(frames).grouped_by(r"\w+-video\d")
    some = images.select([5, 40, 3])
    assert isinstance(some, LabelledImages)
    assert some.groups == tuple((images.groups or ())[row] for row in (5, 40, 3))
