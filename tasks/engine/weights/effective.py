"""Effective weights of base and adapter, merged while they are read: memory for some rows, not for a model.

for weight in effective_weights(ModelDir.parse("bases/gemma-3-1b-it+runs/teacher")):
    for chunk in weight.chunks():   # [rows, ...] in the base's dtype: base + delta, rounded once
        ...

A base in bitsandbytes' 4 bits is dequantized while it is read: its tensors are those of the 16-bit model.
"""

import math
from collections.abc import Iterator
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


def effective_weights(model: ModelDir, weight: float = 1.0) -> Iterator[Weight]:
    """The model's tensors in name order, the adapter's change times `weight`: W + weight (W_adapter - W).

    Raises BadConfig for an adapter that cannot be merged or scaled, or one of whose tensors matches none of the base.
    """
    base = combine_four_bit(stored_tensors(model.base))
    adapter = Adapter.read(model.adapter, base) if model.adapter else None
    if adapter and weight != 1:
        adapter.check_scalable()
    for name, stored in base.items():
        replacement = adapter.replacement(name) if adapter else None
        if replacement is not None:
            yield Weight(name, replacement, stored.dtype, replaced=True)
        else:
            change = adapter.transform(name) if adapter else None
            yield Weight(name, stored, stored.dtype, _scaled(change, weight) if change and weight != 1 else change)


def _scaled(transform: RowTransform, weight: float) -> RowTransform:
    def change(rows: Tensor, start: int, stop: int) -> Tensor:
        return rows + weight * (transform(rows, start, stop) - rows)

    return change


def effective_tensors(model: ModelDir) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every effective weight, one at a time."""
    return ((weight.name, weight.rows()) for weight in effective_weights(model))
