# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The gate of an MLP, forward and backward, as Triton kernels; float32 inside, whatever the tensors hold.

gelu by tanh is Hendrycks & Gimpel's approximation (arXiv 1606.08415): 0.79788 is sqrt(2 / pi).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def forward(gate_up: Tensor, silu: bool) -> Tensor:
    """act(gate) * up (M, F) of (M, 2F)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    _forward[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, SILU=silu, BLOCK=BLOCK)
    return out


def backward(gate_up: Tensor, dh: Tensor, silu: bool, in_place: bool) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up (M, 2F), act(gate) * up); the latter takes the place of `dh`."""
    rows, width = dh.shape
    out = gate_up if in_place else torch.empty_like(gate_up)
    _backward[(rows, triton.cdiv(width, BLOCK))](gate_up, dh, out, width, SILU=silu, BLOCK=BLOCK)
    return out, dh


@triton.jit
def _activation(gate, SILU: tl.constexpr):
    """The activation and its slope."""
    if SILU:
        s = tl.sigmoid(gate)
        act = gate * s
        slope = s * (1 + gate * (1 - s))
    else:
        square = gate * gate
        t = 2 * tl.sigmoid(2 * 0.7978845608028654 * gate * (1 + 0.044715 * square)) - 1
        act = 0.5 * gate * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * square)
    return act, slope


@triton.jit
def _forward(gate_up, out, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=there, other=0.0).to(tl.float32)
    act, _ = _activation(gate, SILU)
    tl.store(out + row * width + column, (act * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _backward(gate_up, dh, out, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    first = row * 2 * width + column
    gate = tl.load(gate_up + first, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + first + width, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * width + column, mask=there, other=0.0).to(tl.float32)
    act, slope = _activation(gate, SILU)
    tl.store(out + first, (grad * up * slope).to(out.dtype.element_ty), mask=there)
    tl.store(out + first + width, (grad * act).to(out.dtype.element_ty), mask=there)
    tl.store(dh + row * width + column, (act * up).to(dh.dtype.element_ty), mask=there)
