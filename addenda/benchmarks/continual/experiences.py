"""Experiences made of sets of images: a set dealt out class by class, or each set an experience of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np
import torch

from addenda.benchmarks.continual.sets import ImageSet
from addenda.benchmarks.continual.stream import Experience, Stream, slug
from addenda.exceptions import DataError
from addenda.learner.data import LabelledImages


def by_class(
    name: str,
    images: ImageSet,
    num_experiences: int,
    class_order: str | int | Sequence[str] = "sorted",
    first: int | None = None,
) -> Stream:
    """A stream whose experiences have classes of their own; its labels stand in the order in which they come.

    Args:
        name: the stream's.
        images: the set.
        num_experiences: how many.
        class_order: `"sorted"` is the set's own order; a seed draws one; or the names in order.
        first: classes of the first experience; None gives each the same number.

    Raises:
        DataError: the classes do not divide so, or the order does not name each once.

    Source of a seed's order: PyCIL and LAMDA-PILOT draw it with numpy's legacy generator, most often with 1993.
    """
    known = images.train.labels
    sizes = _sizes(images.name, len(known), num_experiences, first)
    labels = tuple(known[i] for i in _order(images.name, known, class_order))
    parts = [_labelled(part, labels, part.labels) for part in (images.train, images.test)]
    width = len(str(num_experiences))
    experiences = []
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        train, test = (
            p.select(((p.targets >= start) & (p.targets < start + size)).nonzero().flatten().tolist()) for p in parts
        )
        experiences.append(_experience(f"{name}-{number + 1:0{width}}", train, test))
    return Stream(name, labels, tuple(experiences))


def by_set(name: str, sets: Sequence[ImageSet], shared_labels: bool) -> Stream:
    """A stream of which each set is one experience.

    Args:
        name: the stream's.
        sets: in order.
        shared_labels: whether equal class names mean the same class; else a class is called `set/class`.

    Raises:
        DataError: two sets have one name.
    """
    names = [slug(one.name) for one in sets]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise DataError(
            f"Two sets of the stream {name!r} are called {repeated[0]!r}. Give each folder a name of its own."
        )

    def called(one: ImageSet, label: str) -> str:
        return label if shared_labels else f"{one.name}/{label}"

    labels = tuple(dict.fromkeys(called(one, label) for one in sets for label in one.train.labels))
    experiences = []
    for experience, one in zip(names, sets, strict=True):
        parts = [_labelled(p, labels, [called(one, label) for label in p.labels]) for p in (one.train, one.test)]
        experiences.append(_experience(experience, *parts))
    return Stream(name, labels, tuple(experiences))


def limited(stream: Stream, limit: int | None, test_limit: int | None, seed: int) -> Stream:
    """The stream with fewer images: each class of an experience gives as many as the others, or all it has.

    Args:
        stream: all of it.
        limit: training images of an experience at most; None takes all.
        test_limit: test images likewise.
        seed: of the draw.

    Raises:
        DataError: a limit leaves a class fewer than two images to learn from, or none to be tested on.
    """
    return replace(
        stream,
        experiences=tuple(
            replace(
                one,
                train=_drawn(one.train, limit, seed, 2 * len(one.classes), f"`limit` of {limit}", one.name),
                test=_drawn(one.test, test_limit, seed, len(one.classes), f"`test_limit` of {test_limit}", one.name),
            )
            for one in stream.experiences
        ),
    )


def _drawn(images: LabelledImages, limit: int | None, seed: int, least: int, said: str, name: str) -> LabelledImages:
    if limit is None or limit >= len(images):
        return images
    if limit < least:
        raise DataError(f"The {said} images is too small for experience {name!r}: its classes need {least}.")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    return images.select(in_turn(order, images.targets.tolist(), limit))


def in_turn(order: Sequence[int], targets: Sequence[int], limit: int) -> list[int]:
    """So many rows: of each class the first in the order, then of each the second, and so on; sorted."""
    seen: Counter[int] = Counter()
    turns = []
    for row in order:
        turns.append((seen[targets[row]], row))
        seen[targets[row]] += 1
    turns.sort(key=itemgetter(0))
    return sorted(row for _, row in turns[:limit])


def _labelled(images: LabelledImages, labels: tuple[str, ...], called: Sequence[str]) -> LabelledImages:
    """The images with targets among the stream's labels, where their own classes are called so."""
    numbers = torch.tensor([labels.index(label) for label in called], dtype=torch.int64, device="cpu")
    return replace(images, labels=labels, targets=numbers[images.targets])


def _experience(name: str, train: LabelledImages, test: LabelledImages) -> Experience:
    return Experience(name, tuple(sorted(set(train.targets.tolist()))), train, test)


def _sizes(name: str, num_classes: int, num_experiences: int, first: int | None) -> list[int]:
    """Classes of each experience."""
    others = num_experiences - 1
    each = num_classes // num_experiences if first is None else (num_classes - first) // others
    sizes = [first or each, *[each] * others]
    if sum(sizes) == num_classes and min(sizes) >= 2:
        return sizes
    fits = [n for n in range(2, num_classes // 2 + 1) if num_classes % n == 0]
    firsts = [n for n in range(2, num_classes - 2 * others + 1) if (num_classes - n) % others == 0]
    hints = [f"{', '.join(map(str, fits))} experiences"] if fits else []
    if firsts:
        hints.append(f"a `first` of {min(firsts, key=lambda n: abs(n - num_classes / num_experiences))} classes")
    elif num_classes >= 4:
        hints.append(f"up to {num_classes // 2} with `first`, the classes of the first one, in a YAML file")
    asked = f", {first} in the first," if first else ""
    raise DataError(
        f"The {num_classes} classes of {name!r}{asked} do not divide evenly into {num_experiences} experiences of two "
        f"classes or more. What fits: {', or '.join(hints) or 'nothing; it has too few classes'}."
    )


def _order(name: str, labels: Sequence[str], class_order: str | int | Sequence[str]) -> list[int]:
    """The classes' numbers in the order in which they come."""
    if class_order == "sorted":
        return list(range(len(labels)))
    if isinstance(class_order, int):
        order: list[int] = np.random.RandomState(class_order).permutation(len(labels)).tolist()
        return order
    missing, unknown = sorted(set(labels) - set(class_order)), sorted(set(class_order) - set(labels))
    if missing or unknown or len(class_order) != len(labels):
        wrong = [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        wrong += [f"has {', '.join(map(repr, unknown))}, which it does not know"] if unknown else []
        raise DataError(
            f"`class_order` must name each class of {name!r} once: it {' and '.join(wrong) or 'names one twice'}."
        )
    return [list(labels).index(label) for label in class_order]
