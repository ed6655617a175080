"""Rows as tensors: the batch that model and loss take, padded on the right.

Rows of models that support it are packed without padding instead (tasks.engine.data.sequence_packing). No attention
mask is made: under causal attention a real token never sees what follows it, and padded positions carry no label.
"""

from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor

from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.losses.gradient_accumulation import OverwriteBuffer


class Batch(TypedDict):
    """B rows of L tokens: `input_ids` (B, L); `positions` (N,) into the flattened (B * L) whose next token is a label;
    these tokens as `labels` (N,).

    Labels are in the order of `rows` (indices into the examples), then of position. A packed batch has B = 1,
    `position_ids` (1, L) that restart with each row, and the rows' borders `cu_seqlens` (rows + 1,) in int32; both
    are None in a padded one. `longest` bounds the tokens of its rows. `head_grad` (V, H), where set, takes the
    head's gradient of the summed loss, `head_weight` is the head in the dtype that it is multiplied in, and
    `decoder` runs the layers in place of the model's own (tasks.engine.speed.cuda_graphs).
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    rows: list[int]
    tokens: int
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    longest: int
    head_grad: NotRequired[Tensor | OverwriteBuffer]
    head_weight: NotRequired[Tensor]
    decoder: NotRequired[Callable[["Batch", Tensor], Tensor]]


def collate(items: Sequence[tuple[int, Example]], multiple: int = 1) -> Batch:
    """A batch of (number, example) rows, padded to the longest, rounded up to `multiple`."""
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
