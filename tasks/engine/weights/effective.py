"""A model's weights as they are in effect, an adapter merged on the way: memory for some rows, not for a model.

for weight in weights(ModelDir.parse("bases/gemma-3-1b-it+runs/teacher")):
    for chunk in weight.chunks():   # [rows, ...] in the base's dtype: base + delta, rounded once
        ...

A base in bitsandbytes' 4 bits is dequantized on the way: its tensors are those of the 16-bit model.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.core.refs import ModelDir
from tasks.engine.weights.adapter_delta import Adapter, Patch
from tasks.engine.weights.nf4 import Packed, unpacked
from tasks.engine.weights.safetensors_reader import DTYPES, Stored, stored_tensors

CHUNK_BYTES = 8 << 20


class Weight(NamedTuple):
    """A tensor of a model as it is in effect; `patch` is the adapter's change, None where there is none.

    `replaced` says that the tensor is the adapter's own (`modules_to_save`); it is cast to the base's dtype.
    """

    name: str
    stored: Stored | Packed
    dtype: torch.dtype
    patch: Patch | None = None
    replaced: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the base."""
        return self.stored.shape

    @property
    def changed(self) -> bool:
        """Whether an adapter touches it."""
        return self.patch is not None or self.replaced

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (all of them by default) in the base's dtype."""
        rows = self.stored.rows(start, stop)
        if self.patch is not None:
            rows = self.patch(rows.float(), start, start + len(rows))
        return rows.to(self.dtype)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """All rows in order, in pieces of about `chunk_bytes` (counted in float32)."""
        if not self.shape:
            yield self.rows()
            return
        step = max(1, chunk_bytes // (4 * max(1, math.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, start + step)


def weights(model: ModelDir, more: Sequence[tuple[Path, float]] = (), weight: float = 1.0) -> Iterator[Weight]:
    """The model's tensors in name order, each as it is with its adapter merged, times `weight`, and `more` adapters.

    Each of several adapters changes the base by its own difference times its weight: W + sum of w_i (W_i - W).
    Raises BadConfig for an adapter that cannot be merged, or one of whose tensors matches no tensor of the base.
    """
    base = unpacked(stored_tensors(model.base))
    given = ([(model.adapter, weight)] if model.adapter else []) + list(more)
    adapters = [(Adapter.read(directory, base), one) for directory, one in given]
    alone = len(adapters) == 1 and adapters[0][1] == 1
    for adapter, _ in adapters:
        adapter.check_alone(alone)
    for name, stored in base.items():
        replacement = adapters[0][0].replacement(name) if alone else None
        if replacement is not None:
            yield Weight(name, replacement, stored.dtype, replaced=True)
        else:
            found = [(patch, one) for adapter, one in adapters if (patch := adapter.patch(name)) is not None]
            yield Weight(name, stored, stored.dtype, found[0][0] if alone and found else _summed(found))


def _summed(patches: list[tuple[Patch, float]]) -> Patch | None:
    if not patches:
        return None

    def change(rows: Tensor, start: int, stop: int) -> Tensor:
        return rows + sum(weight * (patch(rows, start, stop) - rows) for patch, weight in patches)

    return change


def stream(model: ModelDir) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every weight in effect, one at a time."""
    return ((weight.name, weight.rows()) for weight in weights(model))


def write_safetensors(path: Path, tensors: list[Weight], metadata: dict[str, str]) -> None:
    """Writes `tensors` into one file chunk by chunk; the bytes depend on names and values alone."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for weight in tensors:
        start, end = end, end + math.prod(weight.shape) * weight.dtype.itemsize
        header[weight.name] = {"dtype": names[weight.dtype], "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in tensors:
            for chunk in weight.chunks():
                file.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
