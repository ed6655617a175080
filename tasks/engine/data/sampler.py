"""The order in which training meets rows: shuffled epochs, and steps of a window balanced to one size."""

import random
from collections.abc import Sequence

import numpy as np


def row_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Rows of all steps, `batch_size` a step: shuffled epochs one behind the other, without a seam between them.

    Inside a step rows are sorted by length, so that micro-batches need little padding; which rows share a step
    stays random.
    """
    shuffle, order = random.Random(seed), list[int]()
    while len(order) < steps * batch_size:
        order += shuffle.sample(range(len(lengths)), len(lengths))
    return [
        row
        for start in range(0, steps * batch_size, batch_size)
        for row in sorted(order[start : start + batch_size], key=lambda row: (lengths[row], row))
    ]


def balance_steps(sizes: Sequence[tuple[int, int]], order: Sequence[int], batch_size: int, window: int) -> list[int]:
    """`order` with the rows of each `window` steps redistributed among these steps, `batch_size` rows each, so that all
    have about as many tokens and as many labels. `sizes` are a row's tokens and labels.

    A step's static shape has to hold the largest step: what others lack is filled up and computed for nothing. Rows
    are assigned largest first, a row to each step in turn; each goes to the step where both sums stay nearest their
    means.
    """
    balanced = list[int]()
    for start in range(0, len(order), window * batch_size):
        rows = sorted(order[start : start + window * batch_size], key=lambda row: (-sum(sizes[row]), row))
        count = len(rows) // batch_size
        steps, sums = [list[int]() for _ in range(count)], np.zeros((count, 2))
        values = np.array([sizes[row] for row in rows], dtype=float).reshape(-1, 2)
        scale = values.std(0) + 1e-9
        for first in range(0, count * batch_size, count):
            means, free = values[: first + count].sum(0) / count, list(range(count))
            for i in range(first, first + count):
                deviations = np.square((sums[free] + values[i] - means) / scale).sum(1)
                step = free.pop(int(deviations.argmin()))
                steps[step].append(rows[i])
                sums[step] += values[i]
        balanced += [row for step in steps for row in step] + rows[count * batch_size :]
    return balanced
