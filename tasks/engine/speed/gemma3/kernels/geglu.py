# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The MLP's gated activation gelu(gate) * up, forward and backward."""

import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.gemma3.kernels.load_float32 import load_float32

COLUMNS, WARPS = 2048, 4  # of one program


def gated_gelu(gate_up: Tensor) -> Tensor:
    """See reference_ops.gated_gelu."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, width))
    grid = (tokens, triton.cdiv(width, COLUMNS))
    _gated_gelu[grid](gate_up, out, width, BLOCK=COLUMNS, num_warps=WARPS)
    return out


def gated_gelu_backward(gate_up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """See reference_ops.gated_gelu_backward."""
    tokens, width = d_hidden.shape
    grid = (tokens, triton.cdiv(width, COLUMNS))
    _gated_gelu_backward[grid](gate_up, d_hidden, width, BLOCK=COLUMNS, num_warps=WARPS)
    return gate_up, d_hidden


@triton.jit
def _gelu(gate):
    """gelu(x) in its tanh form x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) (arXiv 1606.08415), and its derivative."""
    squared = gate * gate
    sigmoid = tl.sigmoid(2 * 0.7978845608028654 * gate * (1 + 0.044715 * squared))
    inner_slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * squared)
    return gate * sigmoid, sigmoid + gate * sigmoid * (1 - sigmoid) * inner_slope


@triton.jit
def _gated_gelu(gate_up, out, width, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    act, _ = _gelu(load_float32(gate_up, token * 2 * width + column, mask))
    up = load_float32(gate_up, token * 2 * width + width + column, mask)
    tl.store(out + token * width + column, (act * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_gelu_backward(gate_up, d_hidden, width, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, offset = column < width, token * 2 * width + column
    act, gelu_slope = _gelu(load_float32(gate_up, offset, mask))
    up, grad = load_float32(gate_up, offset + width, mask), load_float32(d_hidden, token * width + column, mask)
    tl.store(gate_up + offset, (grad * up * gelu_slope).to(gate_up.dtype.element_ty), mask=mask)
    tl.store(gate_up + offset + width, (grad * act).to(gate_up.dtype.element_ty), mask=mask)
    tl.store(d_hidden + token * width + column, (act * up).to(d_hidden.dtype.element_ty), mask=mask)
