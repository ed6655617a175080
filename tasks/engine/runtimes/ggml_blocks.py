"""Quantizes to llama.cpp's Q8_0 and Q4_0 blocks in torch, bit for bit as ggml's reference quantizer (ggml-quants.c).

A block is 32 neighbours of a row, a float16 scale d and 32 integers: Q8_0 has d = max|x| / 127 and q in -127..127,
Q4_0 has d = x* / -8, x* the value of largest magnitude with its sign, and q in -8..7. A value becomes d * q.
"""

from typing import Literal

import torch
from torch import Tensor

from tasks.core.errors import BadConfig

BlockKind = Literal["Q8_0", "Q4_0"]
BLOCK = 32
BITS: dict[BlockKind, float] = {"Q8_0": 8.5, "Q4_0": 4.5}
ROWS_BYTES = 64 << 20  # size of the pieces that a large weight is rounded in, which bounds the temporaries


def quantize(values: Tensor, kind: BlockKind) -> tuple[Tensor, Tensor]:
    """(d (..., L/32, 1) in float16, q (..., L/32, 32) as whole float32 numbers) of float32 values (..., L).

    Raises BadConfig when L is no multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise BadConfig(f"{kind} needs rows that are a multiple of {BLOCK}; these have {values.shape[-1]} values")
    blocks = values.float().reshape(*values.shape[:-1], -1, BLOCK)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # the first of equal ones, as in ggml
    exact = largest.abs() / 127 if kind == "Q8_0" else (largest + 0.0) / -8  # + 0.0: from -0.0 ggml starts at 0.0
    scaled = blocks * torch.where(exact == 0, 0, 1 / exact)
    if kind == "Q4_0":
        return exact.half(), (scaled + 8.5).trunc().clamp(0, 15) - 8
    magnitude = scaled.abs()
    rounded = magnitude.floor()  # roundf: halves away from zero, and 0.49999997 + 0.5 must not reach 1
    return exact.half(), torch.copysign(rounded + (magnitude - rounded >= 0.5), scaled) + 0.0  # no -0: q is an integer


def dequantize(scale: Tensor, integers: Tensor) -> Tensor:
    """Float32 values (..., L) of the blocks that `quantize` returns, as llama.cpp dequantizes them."""
    return (integers * scale.float()).flatten(-2)


def on_grid(values: Tensor, kind: BlockKind) -> Tensor:
    """`values` (..., L) rounded to the values that a file of `kind` stores, in float32.

    A fixed point: quantized again they give the same blocks. Where a scale is 0 in float16, ggml's first pass leaves
    zeros of both signs, its second pass zeros of one sign, which this returns at once.
    """
    scale, integers = quantize(values, kind)
    integers = torch.where(scale == 0, 0.0, integers)
    scale = torch.where(scale == 0, -0.0 if kind == "Q4_0" else 0.0, scale)
    return dequantize(scale, integers)


@torch.no_grad()
def snap_(weight: Tensor, kind: BlockKind) -> None:
    """Rounds float32 `weight` (rows, L) to the values of `kind` in place, a piece of its rows at a time."""
    rows = max(1, ROWS_BYTES // (4 * weight.shape[-1]))
    for piece in torch.split(weight, rows):
        piece.copy_(on_grid(piece, kind))
