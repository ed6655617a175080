# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""RMS norms fused with the residual addition between them: one kernel forward, one backward.

A program of the backward loops over many tokens and keeps a partial sum of the weights' gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.gemma3.kernels.load_float32 import load_float32

PROGRAMS = 1056  # of a norm's backward: 8 per multiprocessor
WARPS, BACKWARD_WARPS = 1, 1


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference_ops.norm."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    _add_norm[(tokens,)](x, x, x, out, weight, weight, width, eps, ADDS=False, BLOCK=_block(width), num_warps=WARPS)
    return out


def add_norm(x: Tensor, added: Tensor, gain: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See reference_ops.add_norm."""
    tokens, width = x.shape
    summed, out = torch.empty_like(x), torch.empty_like(x)
    block = _block(width)
    _add_norm[(tokens,)](x, added, summed, out, gain, weight, width, eps, ADDS=True, BLOCK=block, num_warps=WARPS)
    return summed, out


def add_norm_backward(
    d_x: Tensor | None, d_normed: Tensor, x: Tensor, added: Tensor | None, gain: Tensor | None, weight: Tensor,
    eps: float, partials: Tensor, recompute_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """See reference_ops.add_norm_backward; the residual stream's gradient is written into `d_x`."""
    tokens, width = x.shape
    d_residual, normed = torch.empty_like(x) if d_x is None else d_x, torch.empty_like(x)
    d_added = None if added is None else torch.empty_like(x)
    _add_norm_backward[(PROGRAMS,)](
        d_residual, d_normed, x, x if added is None else added, weight if gain is None else gain, weight, d_added,
        normed, partials, tokens, width, eps, HAS_DX=d_x is not None, ADDS=added is not None,
        RECOMPUTE_SUM=recompute_sum, LOW=_block(width) // 2, HIGH=_block(width - _block(width) // 2),
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return d_residual, d_added, normed


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


@triton.jit
def _add_norm(x, added, summed, out, gain, weight, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < width
    offset = tl.program_id(0).to(tl.int64) * width + column
    value = load_float32(x, offset, mask)
    if ADDS:
        branch = load_float32(added, offset, mask)
        value += branch * tl.rsqrt(tl.sum(branch * branch) / width + eps) * (1 + load_float32(gain, column, mask))
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + offset, rounded, mask=mask)
        value = rounded.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps) * (1 + load_float32(weight, column, mask))
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _load_halves(row, low, high, mask):
    """A token's values in two blocks: in one block, rows little longer than a power of two would waste half of it."""
    return tl.load(row + low).to(tl.float32), tl.load(row + high, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(row, low, high, mask, low_values, high_values):
    tl.store(row + low, low_values.to(row.dtype.element_ty))
    tl.store(row + high, high_values.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _mean_product(low_a, high_a, low_b, high_b, width):
    return (tl.sum(low_a * low_b) + tl.sum(high_a * high_b)) / width


@triton.jit
def _add_norm_backward(
    d_x, d_normed, x, added, gain, weight, d_added, normed, partials, tokens, width, eps,
    HAS_DX: tl.constexpr, ADDS: tl.constexpr, RECOMPUTE_SUM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    mask = high < width
    program, programs = tl.program_id(0), tl.num_programs(0)
    d_weight_low, d_weight_high = tl.zeros((LOW,), tl.float32), tl.zeros((HIGH,), tl.float32)
    d_gain_low, d_gain_high = d_weight_low, d_weight_high
    for step in range(tl.cdiv(tokens - program, programs)):
        offset = (program + step * programs).to(tl.int64) * width
        v_low, v_high = _load_halves(x + offset, low, high, mask)
        g_low, g_high = _load_halves(d_normed + offset, low, high, mask)
        if ADDS:
            b_low, b_high = _load_halves(added + offset, low, high, mask)
            branch_inverse = tl.rsqrt(_mean_product(b_low, b_high, b_low, b_high, width) + eps)
            gain_low, gain_high = _load_halves(gain, low, high, mask)
            b_low, b_high = b_low * branch_inverse, b_high * branch_inverse
        if RECOMPUTE_SUM:  # rounded as in _add_norm
            v_low = (v_low + b_low * (1 + gain_low)).to(normed.dtype.element_ty).to(tl.float32)
            v_high = (v_high + b_high * (1 + gain_high)).to(normed.dtype.element_ty).to(tl.float32)
        if HAS_DX:
            d_x_low, d_x_high = _load_halves(d_x + offset, low, high, mask)
        weight_low, weight_high = _load_halves(weight, low, high, mask)
        inverse = tl.rsqrt(_mean_product(v_low, v_high, v_low, v_high, width) + eps)
        v_low, v_high = v_low * inverse, v_high * inverse
        d_weight_low += g_low * v_low
        d_weight_high += g_high * v_high
        _store_halves(normed + offset, low, high, mask, v_low * (1 + weight_low), v_high * (1 + weight_high))
        g_low, g_high = g_low * (1 + weight_low), g_high * (1 + weight_high)
        mean = _mean_product(g_low, g_high, v_low, v_high, width)
        v_low, v_high = inverse * (g_low - v_low * mean), inverse * (g_high - v_high * mean)
        if HAS_DX:
            v_low, v_high = v_low + d_x_low, v_high + d_x_high
        v_low, v_high = v_low.to(d_x.dtype.element_ty).to(tl.float32), v_high.to(d_x.dtype.element_ty).to(tl.float32)
        _store_halves(d_x + offset, low, high, mask, v_low, v_high)
        if ADDS:
            d_gain_low += v_low * b_low
            d_gain_high += v_high * b_high
            v_low, v_high = v_low * (1 + gain_low), v_high * (1 + gain_high)
            mean = _mean_product(v_low, v_high, b_low, b_high, width)
            v_low, v_high = branch_inverse * (v_low - b_low * mean), branch_inverse * (v_high - b_high * mean)
            _store_halves(d_added + offset, low, high, mask, v_low, v_high)
    _store_halves(partials + program * width, low, high, mask, d_weight_low, d_weight_high)
    if ADDS:
        _store_halves(partials + (programs + program) * width, low, high, mask, d_gain_low, d_gain_high)
