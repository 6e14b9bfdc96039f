"""From matrices of accuracies to the field's figures, by Avalanche's own metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting
from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer

from addenda.benchmarks.continual.results import Metrics


def measure(matrix: Sequence[Sequence[float | None]]) -> Metrics:
    """The figures of one matrix: accuracy after experience i (row) on experience j (column), None where not measured.

    Every experience weighs the same, however many test images it has. Before anything is learned nothing is answered,
    so forward transfer is the accuracy on an experience before it is learned, where it was measured.
    """
    count = len(matrix)
    forgetting, backward, forward = Forgetting(), BWT(), ForwardTransfer()
    for after, row in enumerate(matrix):
        for on, accuracy in enumerate(row):
            if accuracy is None:
                continue
            if on <= after:
                for metric in (forgetting, backward):
                    metric.update(on, accuracy, initial=on == after)
            if on == after + 1:
                forward.update(on, 0.0, initial=True)
                forward.update(on, accuracy)
    means = [_mean(row[: after + 1]) for after, row in enumerate(matrix)]
    return Metrics(
        average_accuracy=means[-1] or 0.0,
        average_incremental_accuracy=_mean(means),
        forgetting=_mean(map(forgetting.result_key, range(count - 1))),
        backward_transfer=_mean(map(backward.result_key, range(count - 1))),
        forward_transfer=_mean(map(forward.result_key, range(1, count))),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None where one is missing, or all."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None
