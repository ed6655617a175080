# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The gate of the MLP: gelu(gate) * up."""

import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.gemma3.kernels.load_float32 import load

COLUMNS, WARPS = 2048, 4  # of a program


def gated(gate_up: Tensor) -> Tensor:
    """See plain.gated."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, width))
    grid = (tokens, triton.cdiv(width, COLUMNS))
    _gated[grid](gate_up, out, width, BLOCK=COLUMNS, num_warps=WARPS)
    return out


def gated_backward(gate_up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """See plain.gated_backward."""
    tokens, width = dh.shape
    grid = (tokens, triton.cdiv(width, COLUMNS))
    _gated_backward[grid](gate_up, dh, width, BLOCK=COLUMNS, num_warps=WARPS)
    return gate_up, dh


@triton.jit
def _gelu(gate):
    """gelu by tanh (arXiv 1606.08415; 0.79788 is sqrt(2 / pi)), and its slope."""
    square = gate * gate
    share = tl.sigmoid(2 * 0.7978845608028654 * gate * (1 + 0.044715 * square))
    bend = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * square)
    return gate * share, share + gate * share * (1 - share) * bend


@triton.jit
def _gated(gate_up, out, width, BLOCK: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    act, _ = _gelu(load(gate_up, token * 2 * width + at, there))
    up = load(gate_up, token * 2 * width + width + at, there)
    tl.store(out + token * width + at, (act * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated_backward(gate_up, dh, width, BLOCK: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, here = at < width, token * 2 * width + at
    act, slope = _gelu(load(gate_up, here, there))
    up, grad = load(gate_up, here + width, there), load(dh, token * width + at, there)
    tl.store(gate_up + here, (grad * up * slope).to(gate_up.dtype.element_ty), mask=there)
    tl.store(gate_up + here + width, (grad * act).to(gate_up.dtype.element_ty), mask=there)
    tl.store(dh + token * width + at, (act * up).to(dh.dtype.element_ty), mask=there)
