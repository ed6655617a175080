"""Effective weights of base and adapter, merged while they are read: memory for some rows, not for a model.

for weight in effective_weights(ModelDir.parse("bases/gemma-3-1b-it+runs/teacher")):
    for chunk in weight.chunks():   # [rows, ...] in the base's dtype: base + delta, rounded once
        ...

A base in bitsandbytes' 4 bits is dequantized while it is read: its tensors are those of the 16-bit model.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.core.refs import ModelDir
from tasks.engine.weights.adapter_delta import Adapter, RowTransform
from tasks.engine.weights.nf4 import FourBitTensor, combine_four_bit
from tasks.engine.weights.safetensors_reader import StoredTensor, stored_tensors

CHUNK_BYTES = 8 << 20


class Weight(NamedTuple):
    """An effective tensor of a model; `transform` applies the adapter to rows of it, None where there is no adapter.

    `replaced` says that the tensor is the adapter's own (`modules_to_save`); it is cast to the base's dtype.
    """

    name: str
    stored: StoredTensor | FourBitTensor
    dtype: torch.dtype
    transform: RowTransform | None = None
    replaced: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the base."""
        return self.stored.shape

    @property
    def changed(self) -> bool:
        """Whether an adapter touches it."""
        return self.transform is not None or self.replaced

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (all of them by default) in the base's dtype."""
        rows = self.stored.rows(start, stop)
        if self.transform is not None:
            rows = self.transform(rows.float(), start, start + len(rows))
        return rows.to(self.dtype)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """All rows in order, in pieces of about `chunk_bytes` (counted in float32)."""
        if not self.shape:
            yield self.rows()
            return
        step = max(1, chunk_bytes // (4 * max(1, math.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, start + step)


def effective_weights(
    model: ModelDir, further: Sequence[tuple[Path, float]] = (), weight: float = 1.0
) -> Iterator[Weight]:
    """The model's tensors in name order, its adapter merged times `weight`, and `further` adapters times theirs.

    Each of several adapters changes the base by its own difference times its weight: W + sum of w_i (W_i - W).
    Raises BadConfig for an adapter that cannot be merged, or one of whose tensors matches no tensor of the base.
    """
    base = combine_four_bit(stored_tensors(model.base))
    directories = ([(model.adapter, weight)] if model.adapter else []) + list(further)
    adapters = [(Adapter.read(directory, base), factor) for directory, factor in directories]
    single = len(adapters) == 1 and adapters[0][1] == 1
    if not single:
        for adapter, _ in adapters:
            adapter.check_summable()
    for name, stored in base.items():
        replacement = adapters[0][0].replacement(name) if single else None
        if replacement is not None:
            yield Weight(name, replacement, stored.dtype, replaced=True)
        else:
            changes = [(change, factor) for adapter, factor in adapters if (change := adapter.transform(name))]
            yield Weight(name, stored, stored.dtype, changes[0][0] if single and changes else _weighted_sum(changes))


def _weighted_sum(changes: list[tuple[RowTransform, float]]) -> RowTransform | None:
    """W + sum of w_i (W_i - W), where the i-th transform makes W_i of W."""
    if not changes:
        return None

    def change(rows: Tensor, start: int, stop: int) -> Tensor:
        return rows + sum(factor * (transform(rows, start, stop) - rows) for transform, factor in changes)

    return change


def effective_tensors(model: ModelDir) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every effective weight, one at a time."""
    return ((weight.name, weight.rows()) for weight in effective_weights(model))
