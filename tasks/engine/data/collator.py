"""Rows to batches: which rows a step sees, and the tensors that the loss needs.

Rows are packed without padding (tasks.engine.data.sequence_packing), or, for models that cannot be packed, padded
here on the right.
No attention mask is made: under causal attention a real token never sees what follows it, and padded positions carry
no label.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadData
from tasks.core.rows import read_rows
from tasks.engine.data.chat_template import IGNORE, Example, encode, turn_end
from tasks.engine.losses.gradient_accumulation import Fresh


class Batch(TypedDict):
    """`input_ids` (B, L); `positions` (N,) into the flattened (B * L) whose next token is a label; `labels` (N,).

    Labels are in the order of `rows` (places in the list of examples), then of position. A packed batch has B = 1,
    `position_ids` (1, L) that begin anew with each row and the rows' borders `cu_seqlens` (rows + 1,) in int32; both
    are None in a padded one. `longest` bounds the tokens of its rows. `head_grad` (V, H), where it is there, takes the
    head's gradient of the summed loss, `head_weight` is the head in the dtype that it is multiplied in, and
    `stack` runs the layers (tasks.engine.speed.cuda_graphs).
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    rows: list[int]
    tokens: int
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    longest: int
    head_grad: NotRequired[Tensor | Fresh]
    head_weight: NotRequired[Tensor]
    stack: NotRequired[Callable[["Batch", Tensor], Tensor]]


def encode_file(
    tokenizer: PreTrainedTokenizerBase, path: Path, max_length: int, warn: Callable[[str], None]
) -> list[Example]:
    """The rows of a canonical JSONL file as ids; rows over `max_length` tokens are left out, and named."""
    end, kept, long = turn_end(tokenizer), [], []
    for number, row in enumerate(read_rows(path), start=1):
        try:
            example = encode(tokenizer, row, end)
        except ValueError as error:
            raise ValueError(f"{path.name} row {number}: {error}") from error
        if len(example.input_ids) > max_length:
            long.append(f"{number} ({len(example.input_ids)} tokens)")
        else:
            kept.append(example)
    if long:
        named = ", ".join(long[:5]) + (" ..." if len(long) > 5 else "")
        warn(f"{path.name}: {len(long)} rows are longer than max_length={max_length} and left out: {named}")
    if not kept:
        raise BadData(f"{path}: no row to train on: {len(long)} are longer than max_length={max_length}, raise it")
    return kept


def row_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Rows of all steps, `batch_size` a step: one shuffle of all rows after another, without a seam between them.

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


def collate(items: Sequence[tuple[int, Example]], multiple: int = 1) -> Batch:
    """Pads rows to the longest, rounded up to `multiple`."""
    longest = max(len(example.input_ids) for _, example in items)
    longest = -(-longest // multiple) * multiple
    input_ids = torch.zeros((len(items), longest), dtype=torch.long)
    labels = torch.full((len(items), longest), IGNORE)
    for i, (_, example) in enumerate(items):
        input_ids[i, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[i, : len(example.labels) - 1] = torch.tensor(example.labels[1:])  # a position predicts the next token
    flat = labels.flatten()
    positions = (flat != IGNORE).nonzero().squeeze(1)
    return {
        "input_ids": input_ids,
        "positions": positions,
        "labels": flat[positions],
        "rows": [row for row, _ in items],
        "tokens": sum(len(example.input_ids) for _, example in items),
        "position_ids": None,
        "cu_seqlens": None,
        "longest": longest,
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)}
    return cast(Batch, {**batch, **moved})
