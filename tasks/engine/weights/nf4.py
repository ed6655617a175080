"""Dequantizes weights that bitsandbytes stored in 4 bits (NF4, FP4) to float32, rows at a time, in plain torch.

On disk a matrix is codes, two a byte, their 16 levels, a scale for each block, and JSON with shape and block size;
with double quantization the scales are themselves codes of 256 values, with scales and an offset of
their own (QLoRA, arXiv 2305.14314, section 3).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.core.errors import BadConfig
from tasks.engine.weights.safetensors_reader import DTYPES, StoredTensor

QUANT_STATE = ".quant_state.bitsandbytes__"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, eq=False)  # hashed by identity: it holds dicts
class FourBitTensor:
    """A matrix stored in 4 bits, with the interface of `StoredTensor`; `dtype` is that of the matrix before."""

    codes: StoredTensor
    parts: dict[str, StoredTensor]
    state: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of the 16-bit matrix."""
        return DTYPE_NAMES[self.state["dtype"]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the 16-bit matrix."""
        return tuple(self.state["shape"])

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` in float32."""
        row, block = math.prod(self.shape[1:]), int(self.state["blocksize"])
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        first, last = start * row // block, -(-stop * row // block)  # blocks may begin within a row
        low, high = first * block, min(last * block, self.shape[0] * row)
        codes = self.codes.rows(low // 2, -(-high // 2)).flatten()
        levels = self.parts["quant_map"].rows()
        values = levels[torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()]
        scales = self._scales(first, last).repeat_interleave(block)[: len(values)]
        return (values * scales)[start * row - low : stop * row - low].reshape(stop - start, *self.shape[1:])

    def _scales(self, first: int, last: int) -> Tensor:
        stored = self.parts["absmax"].rows(first, last)
        if "nested_absmax" not in self.parts:
            return stored.float()
        block = int(self.state["nested_blocksize"])
        outer = self.parts["nested_absmax"].rows()[torch.arange(first, last) // block]
        return self.parts["nested_quant_map"].rows()[stored.int()] * outer + float(self.state["nested_offset"])


def combine_four_bit(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor | FourBitTensor]:
    """The tensors of a model, with the codes, scales and state of each 4-bit matrix combined into one tensor.

    Raises BadConfig for a 4-bit kind other than bitsandbytes' NF4 and FP4.
    """
    states = {name.partition(QUANT_STATE)[0]: name for name in tensors if QUANT_STATE in name}
    if not states:
        return dict(tensors)
    combined: dict[str, StoredTensor | FourBitTensor] = {}
    for name, stored in tensors.items():
        owner = next((matrix for matrix in (name, name.rpartition(".")[0]) if matrix in states), None)
        if owner is None and QUANT_STATE not in name:
            combined[name] = stored
        elif owner == name:
            state = json.loads(bytes(tensors[states[name]].rows().tolist()))
            if state["quant_type"] not in ("nf4", "fp4"):
                raise BadConfig(f"{name} is stored as {state['quant_type']}: give the 16-bit model it was made from")
            ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = {end: tensors[f"{name}.{end}"] for end in ends if f"{name}.{end}" in tensors}
            combined[name] = FourBitTensor(stored, parts, state)
    return combined
