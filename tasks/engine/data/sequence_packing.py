"""Rows packed one behind the other into micro-batches of planned length: no padding, and shapes known in advance.

    packing = plan_packing(lengths, order, batch_size, micro_batch, shapes=1, multiple=128)
    items = [(row, examples[row]) for row in packing.micro_batches[i]]
    hidden = hidden_states(model, to_device(pack(items, packing), model.device))      # tasks.engine.models.lm_head

The order of rows is known before the run, so every optimizer step's `batch_size` rows are dealt to the same number of
micro-batches, as evenly as their lengths allow, and the tensors of all of them have one of `shapes` static lengths:
`torch.compile` meets no new shape in the middle of a run, and a CUDA graph can be replayed. What is left of a
length is filled with rows of zeros that carry no label. `shapes=0` fills nothing (lengths differ; for the CPU).

Exact: a row's tokens see their own row alone (tasks.engine.speed.packed_attention), its positions begin at 0, and
labels come in
the order of `Batch.rows`. A step's loss is the sum over its micro-batches divided by the step's labels, as ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.collator import Batch


@dataclass(frozen=True)
class Packing:
    """`micro_batches` are lists of rows, a step's side by side; the rest are the shapes of their tensors.

    `lengths` are the static token counts, ascending (empty: each micro-batch as long as its rows); `segments` is the
    number of entries of `cu_seqlens` less one, `longest` the tokens of the longest row, both fixed for the run.
    """

    micro_batches: list[list[int]]
    lengths: tuple[int, ...]
    segments: int
    longest: int

    def length(self, tokens: int) -> int:
        """The static length that `tokens` fit into."""
        return next((length for length in self.lengths if length >= tokens), tokens)


def plan_packing(
    lengths: Sequence[int], order: Sequence[int], batch_size: int, micro_batch: int, shapes: int, multiple: int
) -> Packing:
    """Packs `order` (row_order's: `batch_size` rows a step), `batch_size / micro_batch` micro-batches a step.

    `micro_batch` is the mean number of rows in one; static lengths are rounded up to `multiple`.
    """
    parts = batch_size // micro_batch
    dealt = [
        part
        for start in range(0, len(order), batch_size)
        for part in _deal(lengths, order[start : start + batch_size], parts)
    ]
    return _shaped(lengths, dealt, shapes, multiple)


def evened(sizes: Sequence[tuple[int, int]], order: Sequence[int], batch_size: int, window: int) -> list[int]:
    """`order` with rows of `window` steps dealt anew to the same steps, `batch_size` rows each, so that all have about
    as many tokens and as many labels. `sizes` are a row's tokens and labels.

    A step's static shape has to hold the largest step: what others lack is filled up and computed for nothing. Rows
    are dealt largest first, a row to each step in turn; each takes its place where both sums stay nearest their means.
    """
    dealt = list[int]()
    for start in range(0, len(order), window * batch_size):
        rows = sorted(order[start : start + window * batch_size], key=lambda row: (-sum(sizes[row]), row))
        steps = len(rows) // batch_size
        found, sums = [list[int]() for _ in range(steps)], np.zeros((steps, 2))
        values = np.array([sizes[row] for row in rows], dtype=float).reshape(-1, 2)
        scale = values.std(0) + 1e-9
        for first in range(0, steps * batch_size, steps):
            means, free = values[: first + steps].sum(0) / steps, list(range(steps))
            for at in range(first, first + steps):
                off = np.square((sums[free] + values[at] - means) / scale).sum(1)
                step = free.pop(int(off.argmin()))
                found[step].append(rows[at])
                sums[step] += values[at]
        dealt += [row for step in found for row in step] + rows[steps * batch_size :]
    return dealt


def pack_all(lengths: Sequence[int], room: int, static: bool = False) -> Packing:
    """Packs every row once into micro-batches of at most `room` tokens (or the longest row's), longest rows first.

    For validation and the teacher's pass, where order and number of micro-batches do not matter (first-fit decreasing).
    """
    room = max(room, max(lengths, default=1))
    filled: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fits = next((i for i, left in enumerate(free) if left >= lengths[row]), len(filled))
        if fits == len(filled):
            filled.append([])
            free.append(room)
        filled[fits].append(row)
        free[fits] -= lengths[row]
    return _shaped(lengths, filled, 1 if static else 0, 128)


def _deal(lengths: Sequence[int], rows: Sequence[int], parts: int) -> list[list[int]]:
    """Rows dealt to `parts`, longest first, each to the part with the fewest tokens so far (Graham's LPT)."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        least = min(range(parts), key=lambda part: (loads[part], part))
        dealt[least].append(row)
        loads[least] += lengths[row]
    return dealt


def _shaped(lengths: Sequence[int], micro_batches: list[list[int]], shapes: int, multiple: int) -> Packing:
    """The packing with the static lengths that hold equal shares of its micro-batches, by their tokens."""
    loads = sorted(sum(lengths[row] for row in rows) for rows in micro_batches)
    at = [-(-len(loads) * (i + 1) // shapes) - 1 for i in range(shapes if loads else 0)]
    static = tuple(sorted({-(-loads[i] // multiple) * multiple for i in at}))
    packing = Packing(micro_batches, static, 0, max(lengths, default=1))
    segments = max((_segments(packing, lengths, rows) for rows in micro_batches), default=0)
    return replace(packing, segments=segments)


def _segments(packing: Packing, lengths: Sequence[int], rows: Sequence[int]) -> int:
    tokens = sum(lengths[row] for row in rows)
    return len(rows) - (tokens - packing.length(tokens)) // packing.longest  # rows, and rows of zeros behind them


def pack(items: Sequence[tuple[int, Example]], packing: Packing) -> Batch:
    """A micro-batch as tensors: `input_ids` and `position_ids` (1, length), `cu_seqlens` (segments + 1,) int32.

    Behind the last row's end `cu_seqlens` repeats the length: empty rows, so that its shape is static.
    """
    sizes = [len(example.input_ids) for _, example in items]
    tokens = sum(sizes)
    length = packing.length(tokens)
    fill = [min(packing.longest, length - start) for start in range(tokens, length, packing.longest)]
    segments, rest = torch.tensor([*sizes, *fill], dtype=torch.int32), length - tokens
    ends = F.pad(segments.cumsum(0, dtype=torch.int32), (1, 0))
    input_ids = _numbers([example.input_ids for _, example in items], [0] * rest)
    # A position predicts the next token of its row.
    labels = _numbers([[*example.labels[1:], IGNORE] for _, example in items], [IGNORE] * rest)
    empty = max(0, packing.segments - len(segments)) if packing.lengths else 0
    positions = (labels != IGNORE).nonzero().squeeze(1)
    return {
        "input_ids": input_ids[None],
        "positions": positions,
        "labels": labels[positions],
        "rows": [row for row, _ in items],
        "tokens": tokens,
        "position_ids": (torch.arange(length) - ends[:-1].long().repeat_interleave(segments))[None],
        "cu_seqlens": torch.cat([ends, ends[-1:].expand(empty)]),
        "longest": packing.longest if packing.lengths else max(sizes),
    }


def _numbers(rows: list[list[int]], rest: list[int]) -> Tensor:
    """All of the rows, and `rest`, as one tensor of int64."""
    count = sum(map(len, rows)) + len(rest)
    return torch.from_numpy(np.fromiter(chain(*rows, rest), np.int64, count))  # some ten times as fast as torch.tensor
