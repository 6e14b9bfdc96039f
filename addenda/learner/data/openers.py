"""Opens and checks training and test data: folders of class folders, listings, torch and Hugging Face datasets."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from addenda.backbones import LeftOut, image_files, in_words, joined
from addenda.backbones.image_files import is_hidden
from addenda.exceptions import DataError
from addenda.learner.data.dataset_objects import HubDataset, open_hub_dataset, open_torch_dataset
from addenda.learner.data.labelled import UNREADABLE, ImageDataset, LabelledImages, class_name
from addenda.learner.data.listings import SUFFIXES, listing_has_test_split, open_listing, split_named
from addenda.registry import check_labels

Split = Literal["train", "test"]
Data = str | Path | ImageDataset | HubDataset

log = logging.getLogger(__name__)


def open_parts(
    train: Data, test: Data | None = None, skip_bad: bool = False
) -> tuple[LabelledImages, LabelledImages | None]:
    """Opens training and test data, and checks both without reading an image.

    Args:
        train: the training data.
        test: the test data; None takes the test split of `train`, if it has one.
        skip_bad: skip images that cannot be loaded.

    Raises:
        DataError: the data cannot be opened or learned from, or training and test classes differ.
    """
    images = open_images(train).check_whole(skip_bad)
    check_learnable(images)
    return images, open_test(train, test, images.labels, images.objective.name, skip_bad)


def open_test(
    train: Data, test: Data | None, labels: Sequence[str], objective: str, skip_bad: bool
) -> LabelledImages | None:
    """Opens `test`, or else the test split of `train`, with a task's labels; None if there is neither."""
    test = train if test is None and has_test_part(train) else test
    if test is None:
        return None
    return check_same_labels(labels, open_images(test, "test").check_whole(skip_bad), objective)


def open_images(data: Data, split: Split = "train") -> LabelledImages:
    """Opens a dataset, or the given split of data that has splits, without reading its images.

    Splits are train/ and test/ in a folder, a column `split` of a listing, or the keys of a DatasetDict.
    """
    images = _opened(data, split)
    repeated = sorted(label for label, count in Counter(images.labels).items() if count > 1)
    if repeated:
        raise DataError(f"{images.where} has several classes named {repeated[0]!r}; class names must be unique.")
    return images


def _opened(data: Data, split: Split) -> LabelledImages:
    if isinstance(data, HubDataset):
        return open_hub_dataset(data, split)
    if not isinstance(data, str | Path):
        return open_torch_dataset(data)
    path = Path(data)
    if _is_listing(path):
        return open_listing(path, split)
    if os.path.isfile(path):
        raise DataError(
            f"{str(path)!r} is not a folder or listing. Pass a folder with one folder of images per class, or a "
            f"listing that ends in {' or '.join(SUFFIXES)}."
        )
    return open_folder(path, split)


def has_test_part(data: Data) -> bool:
    """Whether data has a test split beside the training split."""
    if isinstance(data, HubDataset):
        return isinstance(data, Mapping) and "test" in data
    if not isinstance(data, str | Path):
        return False
    path = Path(data)
    if _is_listing(path):
        return listing_has_test_split(path)
    return path.is_dir() and {"train", "test"} <= split_folders(path).keys()


def _is_listing(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not os.path.isdir(path)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of a dataset's splits, by the keys of _SPLIT_WORDS; empty if its folders are classes.

    A folder named like a split is a split if it holds class folders, and a class if it holds images.
    """
    children = _folders(folder)
    named = [(split, child) for child in children if (split := split_named(child.name)) is not None]
    splits: dict[str, Path] = {}
    for split, child in named:
        if not _folders(child):
            continue
        if split in splits:
            raise DataError(
                f"{str(folder)!r} contains both {splits[split].name}/ and {child.name}/, which are named like the same "
                "split. Remove or rename one of them."
            )
        splits[split] = child
    if not splits:
        if len({split for split, _ in named}) > 1 and len(named) == len(children):
            listed = " and ".join(f"{child.name}/" for _, child in named)
            raise DataError(
                f"{str(folder)!r} contains {listed}, which are named like splits but hold no class folders. Put the "
                f"images of each class into a folder of its own: {named[0][1].name}/cat/1.jpg. If these are classes, "
                "rename them."
            )
        return {}
    if len(splits) == 1:
        (only,) = splits.values()
        beside = next((child for child in children if child != only and image_files(child)[0]), None)
        if beside is not None:
            raise DataError(
                f"{str(folder)!r} contains {only.name}/, which holds class folders, and {beside.name}/, which holds "
                f"images and may be a class or a split. Rename {only.name}/ if it is a class; otherwise move "
                f"{beside.name}/ elsewhere, or into {only.name}/."
            )
    return splits


def open_folder(folder: Path, split: Split) -> LabelledImages:
    """Opens a folder of class folders, or a split of one; images in subfolders belong to their class folder."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}.")
    splits = split_folders(folder)
    if not splits:
        return _open_classes(folder, folder, {})
    if split not in splits:
        listed = " and ".join(f"{path.name}/" for path in splits.values())
        kind = "training" if split == "train" else "test"
        raise DataError(  # never with the path of another split, which would train on test images or test on training
            f"{str(folder)!r} contains {listed} but no {split}/. Put the {kind} images into {str(folder / split)!r}, "
            f"or pass a folder that holds the class folders of {kind} images."
        )
    others = [child for child in _folders(folder) if child not in splits.values()]
    validation = [splits["validation"]] if split == "train" and "validation" in splits else []
    chosen = splits[split]
    while len(inner := _folders(chosen)) == 1 and split_named(inner[0].name) == split:  # archives nest them
        chosen = inner[0]
    return _open_classes(chosen, folder, {"validation": validation, "beside_parts": others})


def _open_classes(folder: Path, root: Path, left_out_beside: LeftOut) -> LabelledImages:
    """Opens the class folders in `folder`, which is the dataset's root or one of its splits."""
    classes = _folders(folder)
    if datasets := [path.name for path in classes if split_folders(path)]:
        raise DataError(
            f"{str(folder)!r} contains datasets, not classes: {datasets[0]!r} has splits of its own, such as train/. "
            f"Pass {str(folder / datasets[0])!r}, or list them all in a file for `addenda learn-many`."
        )
    files: dict[str, list[Path]] = {}
    loose, others = image_files(folder, deep=False)
    left_out: list[LeftOut] = [{"beside_classes": loose}, others]
    for path in classes:  # two folders may have one name, in Unicode's two forms
        images, others = image_files(path)
        files.setdefault(class_name(path.name, f"Class folder {str(path)!r}"), []).extend(images)
        left_out.append(others)
    files = dict(sorted(files.items()))
    if not any(files.values()):
        hint = "its images are not in class folders" if loose else "no images were found"
        raise DataError(
            f"{str(folder)!r} has no class folders with images ({hint}). Put the images of each class into a folder "
            f"named after the class: {folder / 'cat' / '1.jpg'}, {folder / 'dog' / '1.jpg'}."
        )
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        description = in_words(joined(left_out), folder)
        raise DataError(
            f"Class folder {empty[0]!r} in {str(folder)!r} has no images. Add images or remove it."
            + (f" (Left out: {description}.)" if description else "")
        )
    paths = [path for paths in files.values() for path in paths]
    subfolders = sorted({path.parent for path in paths} - set(classes))
    if len(classes) == 1 and not any(path.parent == classes[0] for path in paths) and len(subfolders) > 1:
        raise DataError(
            f"{str(folder)!r} contains a single folder, {classes[0].name}/, whose images are in subfolders: "
            f"{subfolders[0].name}/, {subfolders[1].name}/. If these are the classes, pass {str(classes[0])!r}."
        )
    children = [{child.name for child in _folders(path)} for path in classes]
    if len(classes) > 1 and len(children[0]) > 1 and all(names == children[0] for names in children):
        listed = ", ".join(f"{name}/" for name in sorted(children[0])[:3])
        raise DataError(
            f"{str(folder)!r} contains {classes[0].name}/ and {classes[1].name}/, and each of its folders has the same "
            f"subfolders: {listed}. If these are the classes, put the images of each class into one folder, or pass "
            "one of these folders by its own path."
        )
    names = {path.name for path in classes}
    for path, inner in zip(classes, children, strict=True):
        if len(inner) > 1 and inner <= names:
            listed = ", ".join(f"{name}/" for name in sorted(inner)[:3])
            raise DataError(
                f"{str(folder)!r} contains {path.name}/, which holds folders named like its neighbours ({listed}), as "
                f"after unpacking an archive twice. Remove one of the copies, or pass {str(path)!r}."
            )
    targets = [i for i, paths in enumerate(files.values()) for _ in paths]
    return LabelledImages(
        f"{str(folder)!r}",
        tuple(files),
        torch.tensor(targets, dtype=torch.int64, device="cpu"),
        paths,
        folder=root,
        left_out=joined([*left_out, left_out_beside]),
        deeper=tuple(os.path.relpath(path, folder) for path in subfolders),
    )


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without hidden and system folders."""
    try:
        return sorted(child for child in folder.iterdir() if os.path.isdir(child) and not is_hidden(child.name))
    except OSError as error:
        raise DataError(f"The folder {str(folder)!r} cannot be read: {error.strerror}.") from error


def check_learnable(images: LabelledImages) -> None:
    """Raises DataError if a class has no image, or none has two: one for training and one for validation."""
    check_labels(images.labels)
    counts = images.counts
    if empty := [label for label, count in zip(images.labels, counts, strict=True) if not count]:
        more = f" (and {len(empty) - 1} more like it)" if len(empty) > 1 else ""
        raise DataError(f"Class {empty[0]!r} in {images.where} has 0 images{more}. Add images, or remove the class.")
    if max(counts) < 2:
        raise DataError(
            f"{images.where} has a single image of each class: at least one class needs two, one for training and one "
            "for validation."
        )
    common = [images.labels[label] for label in images.objective.too_common(counts, len(images))]
    if common:
        more = f" (and {len(common) - 1} more like it)" if len(common) > 1 else ""
        raise DataError(
            f"Label {common[0]!r} in {images.where} is on every image, or on all but one{more}: at least two images "
            "must lack it, one for training and one for validation."
        )


def check_same_labels(labels: Sequence[str], images: LabelledImages, objective: str) -> LabelledImages:
    """The images with their targets in the order of a task's labels. Not every label needs an image."""
    if images.objective.name != objective:
        raise DataError(
            f"{images.where} is {images.objective.name}; the task is {objective}. Give it {objective} data."
        )
    expected = [class_name(label) for label in labels]
    missing, extra = sorted(set(expected) - set(images.labels)), sorted(set(images.labels) - set(expected))
    if extra:
        differences = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        differences += [f"it also has {', '.join(map(repr, extra))}"]
        raise DataError(
            f"{images.where} does not have the classes of the task: {' and '.join(differences)}. Rename or remove the "
            "classes that the task lacks."
        )
    order = torch.tensor([expected.index(label) for label in images.labels], dtype=torch.long, device="cpu")
    targets = images.objective.reordered(images.targets, order, len(labels))
    return replace(images, labels=tuple(labels), targets=targets)


def repeats(train: LabelledImages, test: LabelledImages | None) -> dict[str, int]:
    """Counts identical images, byte for byte, among hashed images, and warns of them.

    `classes`: training images that also occur with other labels; `copies`: training images beyond the first of each
    content and label; `test`: test images that are training images too.
    """
    assert train.digests is not None
    labels: dict[str, set[str]] = {}
    readable = [row for row, digest in enumerate(train.digests) if digest != UNREADABLE]
    targets = train.targets.tolist()
    for row in readable:
        labels.setdefault(train.digests[row], set()).add(train.label_text(targets[row]))
    contradicting = [row for row in readable if len(labels[train.digests[row]]) > 1]
    in_classes, copies = len(contradicting), len(readable) - sum(map(len, labels.values()))
    in_test = 0 if test is None else sum(test.digest(index) in labels for index in range(len(test)))
    remarks = []
    if contradicting:
        first = contradicting[0]
        known = " and ".join(map(repr, sorted(labels[train.digests[first]])[:2]))
        remarks.append(
            f"{in_classes} training images also occur with other labels, such as {train.item(first).called} with "
            f"{known}, and are learned with each; give each image one label"
        )
    if copies:
        remarks.append(
            f"training images that are copies of others of their class: {copies}, which inflates the validation "
            "score; remove them"
        )
    if test is not None and in_test:
        remarks.append(f"{in_test} of {len(test)} test images are also training images, which inflates the test score")
    if remarks:
        log.warning("Byte-identical images: %s.", "; ".join(remarks))
    return {"classes": in_classes, "copies": copies, "test": in_test}
