# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Norms, and the residual stream between them: one kernel forward, one backward.

A program of the backward goes through many tokens and keeps their share of the weights' gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.gemma3.kernels.load_float32 import load

PROGRAMS = 1056  # of a norm's backward: 8 for each multiprocessor
WARPS, BACK_WARPS = 1, 1


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See plain.norm."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    _add_norm[(tokens,)](x, x, x, out, weight, weight, width, eps, ADDS=False, BLOCK=_block(width), num_warps=WARPS)
    return out


def add_norm(x: Tensor, added: Tensor, gain: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See plain.add_norm."""
    tokens, width = x.shape
    summed, out = torch.empty_like(x), torch.empty_like(x)
    block = _block(width)
    _add_norm[(tokens,)](x, added, summed, out, gain, weight, width, eps, ADDS=True, BLOCK=block, num_warps=WARPS)
    return summed, out


def add_norm_backward(
    dx: Tensor | None, dn: Tensor, x: Tensor, added: Tensor | None, gain: Tensor | None, weight: Tensor, eps: float,
    shares: Tensor, again: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """See plain.add_norm_backward; the residual stream's gradient takes the place of `dx`."""
    tokens, width = x.shape
    total, normed = torch.empty_like(x) if dx is None else dx, torch.empty_like(x)
    dadded = None if added is None else torch.empty_like(x)
    _add_norm_backward[(PROGRAMS,)](
        total, dn, x, x if added is None else added, weight if gain is None else gain, weight, dadded, normed, shares,
        tokens, width, eps, HAS_DX=dx is not None, ADDS=added is not None, AGAIN=again, LOW=_block(width) // 2,
        HIGH=_block(width - _block(width) // 2), num_warps=BACK_WARPS,
    )  # fmt: skip
    return total, dadded, normed


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


@triton.jit
def _add_norm(x, added, summed, out, gain, weight, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    there = at < width
    here = tl.program_id(0).to(tl.int64) * width + at
    value = load(x, here, there)
    if ADDS:
        more = load(added, here, there)
        value += more * tl.rsqrt(tl.sum(more * more) / width + eps) * (1 + load(gain, at, there))
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + here, rounded, mask=there)
        value = rounded.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps) * (1 + load(weight, at, there))
    tl.store(out + here, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _pair(row, low, high, there):
    """A token's numbers in two parts: a power of two that rows are a little longer than would waste half of them."""
    return tl.load(row + low).to(tl.float32), tl.load(row + high, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _keep(row, low, high, there, a, b):
    tl.store(row + low, a.to(row.dtype.element_ty))
    tl.store(row + high, b.to(row.dtype.element_ty), mask=there)


@triton.jit
def _mean(a, b, c, d, width):
    return (tl.sum(a * c) + tl.sum(b * d)) / width


@triton.jit
def _add_norm_backward(
    dx, dn, x, added, gain, weight, dadded, normed, shares, tokens, width, eps,
    HAS_DX: tl.constexpr, ADDS: tl.constexpr, AGAIN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    there = high < width
    program, programs = tl.program_id(0), tl.num_programs(0)
    of_weight, of_weight_high = tl.zeros((LOW,), tl.float32), tl.zeros((HIGH,), tl.float32)
    of_gain, of_gain_high = of_weight, of_weight_high
    for turn in range(tl.cdiv(tokens - program, programs)):
        here = (program + turn * programs).to(tl.int64) * width
        a, b = _pair(x + here, low, high, there)
        grad, grad_high = _pair(dn + here, low, high, there)
        if ADDS:
            more, more_high = _pair(added + here, low, high, there)
            inverse_more = tl.rsqrt(_mean(more, more_high, more, more_high, width) + eps)
            by_gain, by_gain_high = _pair(gain, low, high, there)
            more, more_high = more * inverse_more, more_high * inverse_more
        if AGAIN:  # as _add_norm makes it
            a = (a + more * (1 + by_gain)).to(normed.dtype.element_ty).to(tl.float32)
            b = (b + more_high * (1 + by_gain_high)).to(normed.dtype.element_ty).to(tl.float32)
        if HAS_DX:
            before, before_high = _pair(dx + here, low, high, there)
        by, by_high = _pair(weight, low, high, there)
        inverse = tl.rsqrt(_mean(a, b, a, b, width) + eps)
        a, b = a * inverse, b * inverse
        of_weight += grad * a
        of_weight_high += grad_high * b
        _keep(normed + here, low, high, there, a * (1 + by), b * (1 + by_high))
        grad, grad_high = grad * (1 + by), grad_high * (1 + by_high)
        mean = _mean(grad, grad_high, a, b, width)
        a, b = inverse * (grad - a * mean), inverse * (grad_high - b * mean)
        if HAS_DX:
            a, b = a + before, b + before_high
        a, b = a.to(dx.dtype.element_ty).to(tl.float32), b.to(dx.dtype.element_ty).to(tl.float32)
        _keep(dx + here, low, high, there, a, b)
        if ADDS:
            of_gain += a * more
            of_gain_high += b * more_high
            a, b = a * (1 + by_gain), b * (1 + by_gain_high)
            mean = _mean(a, b, more, more_high, width)
            a, b = inverse_more * (a - more * mean), inverse_more * (b - more_high * mean)
            _keep(dadded + here, low, high, there, a, b)
    _keep(shares + program * width, low, high, there, of_weight, of_weight_high)
    if ADDS:
        _keep(shares + (programs + program) * width, low, high, there, of_gain, of_gain_high)
