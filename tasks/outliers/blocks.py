"""Q8_0 and Q4_0 as ggml's reference quantizes them (ggml-quants.c, gguf-py's quants.py): blocks of 32 in a row."""

import torch
from torch import Tensor

BLOCK = 32


def block_errors(rows: Tensor) -> dict[str, float]:
    """Sums of the squared errors that Q8_0 and Q4_0 would make in blocks `rows` [n, 32] of float32."""
    low, high = rows.aminmax(dim=-1, keepdim=True)
    return {"q8_0": _q8_0(rows, low, high), "q4_0": _q4_0(rows, low, high)}


def block_rows(tensor: Tensor) -> Tensor | None:
    """A tensor's rows as blocks [n, 32]; None where a row is no multiple of 32, which these types cannot hold."""
    if tensor.ndim < 2 or tensor.shape[-1] % BLOCK:
        return None
    return tensor.reshape(-1, BLOCK)


def _q8_0(rows: Tensor, low: Tensor, high: Tensor) -> float:
    """127 steps to the largest magnitude, the step stored in float16; halves round either way at the same error."""
    scale = torch.maximum(high, -low) / 127
    steps = (rows * _inverse(scale)).round_()
    return _squared_error(steps, scale, rows)


def _q4_0(rows: Tensor, low: Tensor, high: Tensor) -> float:
    """16 steps from -8 to 7, where -8 is the value of the largest magnitude (the positive one if two are equal)."""
    scale = torch.where(high >= -low, high, low) / -8
    steps = (rows * _inverse(scale)).add_(8.5).floor_().clamp_(max=15).sub_(8)
    return _squared_error(steps, scale, rows)


def _squared_error(steps: Tensor, scale: Tensor, rows: Tensor) -> float:
    difference = steps.mul_(scale.half().float()).sub_(rows).reshape(-1)
    return float(difference.dot(difference))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)
