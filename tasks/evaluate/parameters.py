"""Statistics of a model's weights: how many, in which types, how large, and whether any is NaN or infinite."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import nn

from tasks.core.errors import GateFailed

CHUNK_BYTES = 1 << 26


class Statistics:
    """Running sums over tensors, in float64."""

    def __init__(self) -> None:
        self.count = self.bytes = 0
        self.kinds: Counter[str] = Counter()
        self.sum = self.squares = self.largest = 0.0
        self.values = 0
        self.largest_in = ""

    def add(self, name: str, total: float, squares: float, largest: float, values: int) -> None:
        """Adds `values` values of tensor `name`: sum, sum of squares, largest magnitude. Raises GateFailed for NaN."""
        if not all(map(math.isfinite, (total, squares, largest))):
            raise GateFailed(f"{name} holds NaN or infinite weights, so no answer of this model means anything")
        self.sum, self.squares, self.values = self.sum + total, self.squares + squares, self.values + values
        if largest > self.largest:
            self.largest, self.largest_in = largest, name

    def result(self) -> dict[str, Any]:
        """Plain numbers; `stored_as` counts parameters by type."""
        mean = self.sum / max(1, self.values)
        return {
            "parameters": self.count,
            "stored_bytes": self.bytes,
            "stored_as": dict(self.kinds.most_common()),
            "mean": mean,
            "std": math.sqrt(max(0.0, self.squares / max(1, self.values) - mean * mean)),
            "largest": self.largest,
            "largest_in": self.largest_in,
        }


def model_statistics(model: nn.Module) -> dict[str, Any]:
    """Statistics of a loaded model. Weights in bitsandbytes' formats are counted, but their values are not read."""
    statistics = Statistics()
    for name, weight in model.named_parameters():
        quant_state = getattr(weight, "quant_state", None)
        count = math.prod(quant_state.shape) if quant_state is not None else weight.numel()
        statistics.count += count
        statistics.bytes += weight.numel() * weight.element_size()
        statistics.kinds["nf4" if quant_state is not None else str(weight.dtype).removeprefix("torch.")] += count
        if quant_state is None and weight.is_floating_point():
            flat = weight.detach().flatten()
            for first in range(0, flat.numel(), CHUNK_BYTES // 8):
                part = flat[first : first + CHUNK_BYTES // 8]
                values = part.double()
                largest = float(values.abs().max())
                statistics.add(name, float(values.sum()), float((values * values).sum()), largest, values.numel())
    return statistics.result()


def gguf_statistics(path: Path) -> dict[str, Any]:
    """Statistics of a GGUF file, its blocks dequantized to the values that llama.cpp computes with."""
    statistics = Statistics()
    for tensor in gguf.GGUFReader(path).tensors:
        kind = gguf.GGMLQuantizationType(tensor.tensor_type)
        statistics.count += int(tensor.n_elements)
        statistics.bytes += int(tensor.n_bytes)
        statistics.kinds[kind.name] += int(tensor.n_elements)
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, CHUNK_BYTES // (8 * int(tensor.n_elements) // max(1, len(rows)) or 1))
        for first in range(0, len(rows), step):
            values = gguf.quants.dequantize(rows[first : first + step], kind).astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                largest = float(np.abs(values).max())
                statistics.add(tensor.name, float(values.sum()), float((values * values).sum()), largest, values.size)
    return statistics.result()
