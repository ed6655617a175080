"""Sequence packing: rows one behind the other in micro-batches of static length, without padding between them.

    packing = pack_steps(lengths, order, batch_size, micro_batch, shapes=1, multiple=128)
    items = [(row, examples[row]) for row in packing.micro_batches[i]]
    batch = to_device(collate_packed(items, packing), model.device)
    hidden = hidden_states(model, batch)                            # tasks.engine.models.lm_head

The order of rows is known before the run, so every optimizer step's `batch_size` rows are assigned to the same number
of micro-batches, as evenly as their lengths allow, and the tensors of all of them have one of `shapes` static lengths:
`torch.compile` meets no new shape in the middle of a run, and a CUDA graph can be replayed. What is left of a
length is filled with rows of zeros that carry no label. `shapes=0` fills nothing (lengths differ; for the CPU).

Packing is exact: a row's tokens attend to their own row alone (tasks.engine.speed.packed_attention), its positions
begin at 0, and labels come in the order of `Batch.rows`. A step's loss is, as for padded rows, the sum over its
micro-batches divided by the step's labels.
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
    """Which rows share a micro-batch, and the static shapes of their tensors.

    `micro_batches` are lists of rows, those of a step side by side. `static_lengths` are token counts, ascending
    (empty: each micro-batch as long as its rows); `segments` is the number of entries of `cu_seqlens` less one,
    `longest` the tokens of the longest row, both fixed for the run.
    """

    micro_batches: list[list[int]]
    static_lengths: tuple[int, ...]
    segments: int
    longest: int

    def static_length(self, tokens: int) -> int:
        """The static length that `tokens` fit into."""
        return next((length for length in self.static_lengths if length >= tokens), tokens)


def pack_steps(
    lengths: Sequence[int], order: Sequence[int], batch_size: int, micro_batch: int, shapes: int, multiple: int
) -> Packing:
    """Packs the steps of `order` (`batch_size` rows each), `batch_size / micro_batch` micro-batches a step.

    `micro_batch` is the mean number of rows in one; static lengths are rounded up to `multiple`.
    """
    parts = batch_size // micro_batch
    micro_batches = [
        rows
        for start in range(0, len(order), batch_size)
        for rows in _assign_longest_first(lengths, order[start : start + batch_size], parts)
    ]
    return _with_static_shapes(lengths, micro_batches, shapes, multiple)


def pack_first_fit(lengths: Sequence[int], capacity: int, static: bool = False) -> Packing:
    """Packs every row once into micro-batches of at most `capacity` tokens (or the longest row's), longest rows first.

    For validation and the teacher's pass, where order and number of micro-batches do not matter (first-fit decreasing).
    """
    capacity = max(capacity, max(lengths, default=1))
    micro_batches: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        index = next((i for i, tokens in enumerate(free) if tokens >= lengths[row]), len(micro_batches))
        if index == len(micro_batches):
            micro_batches.append([])
            free.append(capacity)
        micro_batches[index].append(row)
        free[index] -= lengths[row]
    return _with_static_shapes(lengths, micro_batches, 1 if static else 0, 128)


def _assign_longest_first(lengths: Sequence[int], rows: Sequence[int], parts: int) -> list[list[int]]:
    """Rows assigned to `parts`, longest first, each to the part with the fewest tokens so far (Graham's LPT)."""
    assigned: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        least = min(range(parts), key=lambda part: (loads[part], part))
        assigned[least].append(row)
        loads[least] += lengths[row]
    return assigned


def _with_static_shapes(lengths: Sequence[int], micro_batches: list[list[int]], shapes: int, multiple: int) -> Packing:
    """The packing whose static lengths hold equal shares of its micro-batches, sorted by their tokens."""
    loads = sorted(sum(lengths[row] for row in rows) for rows in micro_batches)
    ranks = [-(-len(loads) * (i + 1) // shapes) - 1 for i in range(shapes if loads else 0)]
    static = tuple(sorted({-(-loads[i] // multiple) * multiple for i in ranks}))
    packing = Packing(micro_batches, static, 0, max(lengths, default=1))
    segments = max((_count_segments(packing, lengths, rows) for rows in micro_batches), default=0)
    return replace(packing, segments=segments)


def _count_segments(packing: Packing, lengths: Sequence[int], rows: Sequence[int]) -> int:
    """Entries of a micro-batch: its rows, and the rows of zeros behind them."""
    tokens = sum(lengths[row] for row in rows)
    return len(rows) - (tokens - packing.static_length(tokens)) // packing.longest


def collate_packed(items: Sequence[tuple[int, Example]], packing: Packing) -> Batch:
    """A packed micro-batch: `input_ids` and `position_ids` (1, length), `cu_seqlens` (segments + 1,) int32.

    Behind the last row's end `cu_seqlens` repeats the length: empty rows, so that its shape is static.
    """
    sizes = [len(example.input_ids) for _, example in items]
    tokens = sum(sizes)
    length = packing.static_length(tokens)
    fill = [min(packing.longest, length - start) for start in range(tokens, length, packing.longest)]
    segments, unused = torch.tensor([*sizes, *fill], dtype=torch.int32), length - tokens
    ends = F.pad(segments.cumsum(0, dtype=torch.int32), (1, 0))
    input_ids = _concatenate([example.input_ids for _, example in items], [0] * unused)
    # A position predicts the next token of its row.
    labels = _concatenate([[*example.labels[1:], IGNORE] for _, example in items], [IGNORE] * unused)
    empty = max(0, packing.segments - len(segments)) if packing.static_lengths else 0
    positions = (labels != IGNORE).nonzero().squeeze(1)
    return {
        "input_ids": input_ids[None],
        "positions": positions,
        "labels": labels[positions],
        "rows": [row for row, _ in items],
        "tokens": tokens,
        "position_ids": (torch.arange(length) - ends[:-1].long().repeat_interleave(segments))[None],
        "cu_seqlens": torch.cat([ends, ends[-1:].expand(empty)]),
        "longest": packing.longest if packing.static_lengths else max(sizes),
    }


def _concatenate(rows: list[list[int]], fill: list[int]) -> Tensor:
    """All of the rows, and `fill` behind them, as one tensor of int64."""
    count = sum(map(len, rows)) + len(fill)
    return torch.from_numpy(np.fromiter(chain(*rows, fill), np.int64, count))  # some ten times as fast as torch.tensor
