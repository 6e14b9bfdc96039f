"""Tests which shapes change bits on this machine; docs/exactness.md refers to it. Prints one line per comparison."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, HEADS, HEAD_DIM, TOKENS, IMAGES = 192, 3, 64, 197, 4


def report(what: str, result: Tensor, expected: Tensor) -> None:
    """Prints whether two results are equal, or their largest difference relative to the largest value."""
    if torch.equal(result, expected):
        print(f"  equal    {what}")
    else:
        difference = ((result - expected).abs().max() / expected.abs().max()).item()
        print(f"  MOVES    {what}: {difference:.1e} of the largest")


@torch.no_grad()
def main() -> None:
    """Runs all comparisons in float32 and bfloat16, with one and two threads."""
    for dtype in (torch.float32, torch.bfloat16):
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            torch.manual_seed(0)
            print(f"{dtype}, {num_threads} thread(s)")
            compare(dtype)


def compare(dtype: torch.dtype) -> None:
    """Runs the comparisons in one dtype."""
    queries, keys, values = (torch.randn(IMAGES, HEADS, TOKENS, HEAD_DIM, dtype=dtype) for _ in range(3))
    frozen = F.scaled_dot_product_attention(queries, keys, values)
    for more in (6, 600):
        mask = torch.zeros(TOKENS, TOKENS + more, dtype=torch.bool)
        mask[:, :TOKENS] = True
        longer = [torch.cat([x, torch.randn(IMAGES, HEADS, more, HEAD_DIM, dtype=dtype)], 2) for x in (keys, values)]
        masked = F.scaled_dot_product_attention(queries, *longer, attn_mask=mask)
        report(f"frozen attention with {more} more keys, all masked", masked, frozen)

    linear = torch.nn.Linear(DIM, 3 * DIM).to(dtype)
    rows = torch.randn(1024, DIM, dtype=dtype)
    all_rows = linear(rows)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 197):
        report(f"linear layer on {count} rows, not 1024", linear(rows[:count].clone()), all_rows[:count])

    # In sums that cancel, only rounding errors are left, so another order of additions always shows.
    half, weights = torch.randn(2 * DIM) * 2.0 ** torch.randint(-6, 7, (2 * DIM,)), torch.randn(DIM, 2 * DIM)
    order = torch.randperm(4 * DIM)
    row = torch.cat([half, half])[order].to(dtype)
    matrix = torch.cat([weights, -weights], 1)[:, order].to(dtype)
    left = F.linear(row.expand(1024, -1).contiguous(), matrix)
    for count in (1, 4, 17, 64, 197):
        result = F.linear(row.expand(count, -1).contiguous(), matrix)
        report(f"sums that cancel, from {4 * DIM} dimensions, on {count} rows, not 1024", result, left[:count])

    memory = torch.randn(20, 5, DIM, dtype=dtype)
    together = linear(memory.flatten(0, 1))
    report("5 memory rows of a task among those of 20 tasks, not alone", together[:5], linear(memory[0]))

    for count in (1, 2, 3, 4, 5, 8):
        matrices = torch.randn(16, HEADS, HEAD_DIM, count, dtype=dtype)
        by_task = torch.randn(16, HEADS, IMAGES, HEAD_DIM, dtype=dtype)
        turned = (by_task.roll(1, 2) @ matrices).roll(-1, 2)
        report(f"scores of {count} memory keys, the image at another place", turned, by_task @ matrices)

    for width, rank in itertools.product((48, DIM), (1, 2, 3, 4, 8)):
        down, up = torch.randn(16, width, rank, dtype=dtype), torch.randn(16, rank, width, dtype=dtype)
        tokens = torch.randn(16, 2 * IMAGES, width, dtype=dtype)
        fewer, all_images = tokens[:, :IMAGES].contiguous() @ down @ up, tokens @ down @ up
        report(f"an update of rank {rank} in {width} dimensions, 4 images not 8", fewer, all_images[:, :IMAGES])

    features, heads = torch.randn(IMAGES, DIM), [torch.randn(count, DIM) for count in (3, 7, 40)]
    concatenated = F.linear(features, torch.cat(heads))
    report("a head of 3 concatenated with others, not alone", concatenated[:, :3], F.linear(features, heads[0]))
    report("a head, one image not four", F.linear(features[:1], heads[1]), F.linear(features, heads[1])[:1])


if __name__ == "__main__":
    main()
