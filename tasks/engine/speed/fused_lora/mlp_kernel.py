# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The gated activation act(gate) * up of an MLP, forward and backward, as Triton kernels that compute in float32.

GELU is Hendrycks & Gimpel's tanh approximation (arXiv 1606.08415): 0.79788 is sqrt(2 / pi).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def forward(gate_up: Tensor, silu: bool) -> Tensor:
    """act(gate) * up (T, F) of gate_up (T, 2F)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    _forward[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, SILU=silu, BLOCK=BLOCK)
    return out


def backward(gate_up: Tensor, dh: Tensor, silu: bool, in_place: bool) -> tuple[Tensor, Tensor]:
    """Gradient of gate_up (T, 2F), and act(gate) * up, which is written into `dh`."""
    rows, width = dh.shape
    out = gate_up if in_place else torch.empty_like(gate_up)
    _backward[(rows, triton.cdiv(width, BLOCK))](gate_up, dh, out, width, SILU=silu, BLOCK=BLOCK)
    return out, dh


@triton.jit
def _activation(gate, SILU: tl.constexpr):
    """The activation and its derivative."""
    if SILU:
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    else:
        squared = gate * gate
        tanh = 2 * tl.sigmoid(2 * 0.7978845608028654 * gate * (1 + 0.044715 * squared)) - 1
        act = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * 0.7978845608028654 * (1 + 3 * 0.044715 * squared)
    return act, slope


@triton.jit
def _forward(gate_up, out, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activation(gate, SILU)
    tl.store(out + row * width + column, (act * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(gate_up, dh, out, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    offset = row * 2 * width + column
    gate = tl.load(gate_up + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + offset + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * width + column, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activation(gate, SILU)
    tl.store(out + offset, (grad * up * slope).to(out.dtype.element_ty), mask=mask)
    tl.store(out + offset + width, (grad * act).to(out.dtype.element_ty), mask=mask)
    tl.store(dh + row * width + column, (act * up).to(dh.dtype.element_ty), mask=mask)
