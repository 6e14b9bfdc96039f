"""Reading images ahead of the model, in batches, with every bad one named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from addenda.exceptions import DataError
from addenda.learner.data.labelled import UnsteadyError, unreadable

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

WINDOW = 16
"""Images read ahead."""


def read_in_batches(
    rows: Sequence[int],
    read: Callable[[int], Tensor],
    size: int,
    take: Callable[[list[tuple[int, Tensor]]], None],
    where: str,
    num_images: int,
    skip_bad: bool,
    what: str,
    report: Report | None,
) -> list[tuple[int, str]]:
    """Reads some rows and hands them on in batches of (row, image); the last may be smaller.

    Args:
        rows: which.
        read: gives a row's image.
        size: rows in a batch.
        take: gets each batch.
        where: what the rows are views of, for messages.
        num_images: how many images there are in it, those not to be read now too.
        skip_bad: leave out images that cannot be read, rather than refuse.
        what: what is being done, for the report.
        report: told of the progress.

    Returns:
        Each row left out, and what was wrong with it.

    Raises:
        DataError: images that cannot be read, all named together, unless skip_bad.
    """
    batch: list[tuple[int, Tensor]] = []
    bad: list[tuple[int, str]] = []
    first: DataError | None = None
    for done, (row, result) in enumerate(_read_ahead(rows, read), 1):
        if isinstance(result, DataError):
            bad.append((row, str(result)))
            first = first or result
        elif not bad or skip_bad:  # once a run is lost, the rest is only read, to name every bad image
            batch.append((row, result))
        if len(batch) == size:
            take(batch)
            batch = []
        if report is not None:
            report(what, done, len(rows))
    texts = list(dict.fromkeys(text for _, text in bad))
    if bad and (not skip_bad or len({row % num_images for row, _ in bad}) == num_images):
        raise unreadable(texts, num_images, where) from first
    if batch:
        take(batch)
    return bad


def _read_ahead(rows: Sequence[int], read: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor | DataError]]:
    """Reads rows in order, a few ahead of the model, on another thread."""

    def attempt(row: int) -> Tensor | DataError:
        try:
            return read(row)
        except UnsteadyError:
            raise
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=1) as pool:
        futures = [pool.submit(attempt, row) for row in rows[:WINDOW]]
        for index, row in enumerate(rows):
            yield row, futures.pop(0).result()
            if index + WINDOW < len(rows):
                futures.append(pool.submit(attempt, rows[index + WINDOW]))
