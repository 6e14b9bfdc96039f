"""Folders of class folders, with or without parts: what is a class, what is a part, and what is neither."""

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

Part = Literal["train", "test"]

_PARTS = {
    "train": r"(train|training|trn)(set|data|images|imgs)?|训练集?",
    "test": r"(test|testing|tst)(set|data|images|imgs)?|测试集?",
    "validation": r"(val|valid|validation|dev|eval|evaluation)(set|data|images|imgs)?|验证集?",
}
"""What a word of a folder's name is where the folder is a part: seg_train, test2017, Training Set, valImages."""


def part_named(name: str) -> str | None:
    """The part that people call so: "train", "test" or "validation"; None for any other name."""
    words = re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])", name)
    found = {part for part, form in _PARTS.items() if any(re.fullmatch(form, word.casefold()) for word in words)}
    return found.pop() if len(found) == 1 else None


def class_name(text: str, called: str = "A class") -> str:
    """A class's name in Unicode's composed form (macOS writes it otherwise); DataError where it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{called} has a name that is not UTF-8, {text!r}: rename it.") from error
    return unicodedata.normalize("NFC", text)


def parts_of(folder: Path) -> dict[str, Path]:
    """The folders of a data set's parts by their names in _PARTS; none where its folders are classes.

    Folders named as parts are parts if they hold class folders, and classes if they hold images.
    """
    children = _folders(folder)
    named = [(part, child) for child in children if (part := part_named(child.name)) is not None]
    parts: dict[str, Path] = {}
    for part, child in named:
        if not _folders(child):
            continue
        if part in parts:
            raise DataError(
                f"{str(folder)!r} has both {parts[part].name}/ and {child.name}/ in it. Leave one, or give a part by "
                f"its own path: {str(child)!r}."
            )
        parts[part] = child
    if not parts:
        if len({part for part, _ in named}) > 1 and len(named) == len(children):
            listed = " and ".join(f"{child.name}/" for _, child in named)
            raise DataError(
                f"{str(folder)!r} has {listed} in it, which are named as parts and hold no class folders. Put each "
                f"class's images into a folder of its own: {named[0][1].name}/cat/1.jpg."
            )
        return {}
    if len(parts) == 1:
        (only,) = parts.values()
        beside = next((child for child in children if child != only and image_files(child)[0]), None)
        if beside is not None:
            raise DataError(
                f"{str(folder)!r} has {only.name}/ in it, which holds class folders, and {beside.name}/ beside it, "
                f"which holds images: is that a class or a part? Give {str(only)!r} itself, or put all classes into it."
            )
    return parts


def open_folder(folder: Path, part: Part) -> LabelledImages:
    """Opens a folder of class folders, or such a part of one; images in folders inside a class folder are its."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}.")
    parts = parts_of(folder)
    if not parts:
        return _open_classes(folder, folder, {})
    if part not in parts:
        listed = " and ".join(f"{path.name}/" for path in parts.values())
        raise DataError(
            f"{str(folder)!r} has {listed} in it and no {part}/. Give the part to use by its own path: "
            f"{str(next(iter(parts.values())))!r}."
        )
    beside = [child for child in _folders(folder) if child not in parts.values()]
    validation = [parts["validation"]] if part == "train" and "validation" in parts else []
    place = parts[part]
    while len(inner := _folders(place)) == 1 and part_named(inner[0].name) == part:  # as archives wrap them
        place = inner[0]
    return _open_classes(place, folder, {"validation": validation, "beside_parts": beside})


def _open_classes(folder: Path, whole: Path, beside_it: LeftOut) -> LabelledImages:
    """The classes in a folder, which is a whole data set or a part of one; and what was left out beside it."""
    classes = _folders(folder)
    if tasks := [p.name for p in classes if parts_of(p)]:
        raise DataError(
            f"{str(folder)!r} holds data sets, not classes: {tasks[0]!r} in it has train/ of its own, or another part. "
            f"Give {str(folder / tasks[0])!r}, or name them all in a file for `addenda learn-many`."
        )
    files: dict[str, list[Path]] = {}
    loose, beside = image_files(folder, deep=False)
    left_out: list[LeftOut] = [{"beside_classes": loose}, beside]
    for place in classes:  # two folders may have one name in Unicode's two forms
        found, besides = image_files(place)
        files.setdefault(class_name(place.name, f"Class folder {str(place)!r}"), []).extend(found)
        left_out.append(besides)
    files = dict(sorted(files.items()))
    if not any(files.values()):
        hint = "its images lie side by side" if loose else "no image was found in it"
        raise DataError(
            f"{str(folder)!r} has no class folders with images ({hint}). Put each class's images into a folder named "
            f"after the class: {folder.name}/cat/1.jpg, {folder.name}/dog/1.jpg."
        )
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        said = in_words(joined(left_out), folder)
        raise DataError(
            f"Class folder {empty[0]!r} in {str(folder)!r} has no images. Fill it or remove it."
            + (f" (Left out: {said}.)" if said else "")
        )
    paths = [path for paths in files.values() for path in paths]
    deeper = sorted({path.parent for path in paths} - set(classes))
    if len(classes) == 1 and not any(path.parent == classes[0] for path in paths) and len(deeper) > 1:
        raise DataError(
            f"{str(folder)!r} has one folder, {classes[0].name}/, and its images lie in folders inside that: "
            f"{deeper[0].name}/, {deeper[1].name}/. If these are the classes, give {str(classes[0])!r}."
        )
    alike = [{child.name for child in _folders(place)} for place in classes]
    if len(classes) > 1 and len(alike[0]) > 1 and all(names == alike[0] for names in alike):
        raise DataError(
            f"{str(folder)!r} has {classes[0].name}/ and {classes[1].name}/ in it, and each of its folders holds the "
            f"same: {', '.join(f'{name}/' for name in sorted(alike[0])[:3])}. Are those the classes? Put the images of "
            "each class into one folder, or give one of these folders by its own path."
        )
    targets = [i for i, paths in enumerate(files.values()) for _ in paths]
    return LabelledImages(
        f"{str(folder)!r}",
        tuple(files),
        torch.tensor(targets, dtype=torch.int64, device="cpu"),
        paths,
        folder=whole,
        left_out=joined([*left_out, beside_it]),
        deeper=tuple(os.path.relpath(place, folder) for place in deeper),
    )


def _folders(place: Path) -> list[Path]:
    """The folders in a folder that are a person's own, in the order of their names."""
    try:
        return sorted(child for child in place.iterdir() if os.path.isdir(child) and not is_hidden(child.name))
    except OSError as error:
        raise DataError(f"The folder {str(place)!r} cannot be read: {error.strerror}.") from error
