"""What names, tags, labels and other texts may be."""

from __future__ import annotations

import re
from collections.abc import Sequence

from addenda.exceptions import RegistryError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=:/-]{0,99}")

RESERVED = {
    "auto": "`--task auto` and `--extends auto` let Addenda choose among all tasks",
    "combined": "the server answers for all tasks together under it",
    "none": "it is what a router answers where no task fits",
}
"""Words that stand where a task's name could stand, and what they mean there."""

LABELS, LABEL_CHARACTERS, LABELS_BYTES = 50_000, 1_000, 4_000_000
"""How many labels a task may have; characters of one, bytes of all together: they stand in answers."""


def check_name(name: str) -> str:
    """Returns a valid task or alias name; raises RegistryError for any other."""
    if not NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} is not a valid name: use lower-case letters, digits, '-' and '_', first a letter or digit, "
            "63 characters at most."
        )
    return name


def check_new_name(name: str) -> str:
    """Returns a name that a task may be given; raises RegistryError for one that means something else in its place.

    Tasks that have one from before are reached as `name:version`.
    """
    if name in RESERVED:
        raise RegistryError(f"No task can be called {name!r}: {RESERVED[name]}. Choose another name.")
    return check_name(name)


def check_tag(tag: str) -> str:
    """Returns a valid tag; raises RegistryError for any other."""
    if not TAG.fullmatch(tag):
        raise RegistryError(
            f"{tag!r} is not a valid tag: use letters, digits and '.', '_', '=', ':', '/', '-', first a letter or "
            "digit, 100 characters at most."
        )
    return tag


def check_labels(labels: Sequence[str]) -> None:
    """Raises RegistryError where labels are too long, or hold what no database or file of text can."""
    if len(labels) > LABELS:
        raise RegistryError(f"There are {len(labels):,} labels; {LABELS:,} is the most.")
    for label in labels:
        check_text(label, f"The label {label[:40]!r}")
        if not label:
            raise RegistryError("A label is empty: every class needs a name.")
        if len(label) > LABEL_CHARACTERS:
            raise RegistryError(
                f"The label {label[:40]!r}… has {len(label):,} characters; {LABEL_CHARACTERS:,} is the most."
            )
    if (together := sum(len(label.encode()) for label in labels)) > LABELS_BYTES:
        raise RegistryError(f"{len(labels):,} labels have {together:,} bytes together; {LABELS_BYTES:,} is the most.")


def check_text(text: str, what: str) -> str:
    """Returns a text that every database and file can hold; a RegistryError begins with what it is."""
    if "\0" in text:
        raise RegistryError(f"{what} holds a NUL character, which PostgreSQL cannot keep: leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RegistryError(f"{what} is not UTF-8: {text[:40]!r}.") from error
    return text
