"""Folders of class folders, with or without train, validation and test folders: which folder is what."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Literal

import torch

from addenda.backbones.image_files import LeftOut, image_files, in_words, is_hidden, joined
from addenda.exceptions import DataError
from addenda.learner.data.labelled import LabelledImages

Split = Literal["train", "test"]

_SPLIT_WORDS = {
    "train": r"(train|training|trn)(set|data|images|imgs)?|训练集?",
    "test": r"(test|testing|tst)(set|data|images|imgs)?|测试集?",
    "validation": r"(val|valid|validation|dev|eval|evaluation)(set|data|images|imgs)?|验证集?",
}
"""Words in the name of a folder that holds a split: seg_train, test2017, Training Set, valImages."""


def split_named(name: str) -> str | None:
    """The split that a name stands for: "train", "test" or "validation"; None for any other name."""
    words = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])", name)
    splits = {
        split for split, form in _SPLIT_WORDS.items() if any(re.fullmatch(form, word.casefold()) for word in words)
    }
    return splits.pop() if len(splits) == 1 else None


def class_name(text: str, owner: str = "A class") -> str:
    """A class name in Unicode's composed form (macOS decomposes names); DataError if it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{owner} has a name that is not UTF-8, {text!r}; rename it.") from error
    return unicodedata.normalize("NFC", text)


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
                f"images of each class into a folder of its own: {named[0][1].name}/cat/1.jpg."
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
            f"named after the class: {folder.name}/cat/1.jpg, {folder.name}/dog/1.jpg."
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
