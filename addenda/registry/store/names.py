"""Validation of names, tags, labels and other text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from addenda.exceptions import RegistryError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=:/-]{0,99}")

RESERVED = {
    "auto": "`--task auto` and `--extends auto` choose among all tasks",
    "combined": "the server uses it for predictions of all tasks together",
    "features": "the server uses it for the features of images",
    "none": "a router returns it when no task fits",
}
"""Reserved words, and their meaning in the place of a task name."""

LABELS, LABEL_CHARACTERS, LABELS_BYTES = 50_000, 1_000, 4_000_000
"""Maximum number of labels of a task, of characters per label, and of bytes in total; predictions contain labels."""


def check_name(name: str) -> str:
    """Returns a valid task or alias name; raises RegistryError otherwise."""
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} is not a valid name: use at most 63 lower-case letters, digits, '-' and '_', starting with a "
            "letter or digit."
        )
    return name


def check_new_name(name: str) -> str:
    """Returns a valid name for a new task; raises RegistryError for invalid or reserved names.

    Tasks that were registered under a name before it was reserved are still reached as `name:version`.
    """
    if name in RESERVED:
        raise RegistryError(f"The name {name!r} is reserved: {RESERVED[name]}. Choose another name.")
    return check_name(name)


def check_tag(tag: str) -> str:
    """Returns a valid tag; raises RegistryError otherwise."""
    if not TAG.fullmatch(tag):
        raise RegistryError(
            f"{tag!r} is not a valid tag: use at most 100 letters, digits and '.', '_', '=', ':', '/', '-', starting "
            "with a letter or digit."
        )
    return tag


def check_labels(labels: Sequence[str]) -> None:
    """Raises RegistryError if there are too many labels, or a label is too long, empty or not storable."""
    if len(labels) > LABELS:
        raise RegistryError(f"There are {len(labels):,} labels; the maximum is {LABELS:,}.")
    for label in labels:
        check_text(label, f"The label {label[:40]!r}")
        if not label:
            raise RegistryError("A label is empty: every class needs a name.")
        if len(label) > LABEL_CHARACTERS:
            raise RegistryError(
                f"The label {label[:40]!r}… has {len(label):,} characters; the maximum is {LABEL_CHARACTERS:,}."
            )
    if (total := sum(len(label.encode()) for label in labels)) > LABELS_BYTES:
        raise RegistryError(f"{len(labels):,} labels have {total:,} bytes in total; the maximum is {LABELS_BYTES:,}.")


MAX_TEXT = 1_000
"""Maximum characters of a reason or an author, here and in what is imported."""


def check_text(text: str, what: str) -> str:
    """Returns text that every database and file can store; the message of a RegistryError starts with `what`."""
    if "\0" in text:
        raise RegistryError(f"{what} contains a NUL character, which PostgreSQL cannot store; remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RegistryError(f"{what} cannot be encoded as UTF-8: {text[:40]!r}.") from error
    return text
