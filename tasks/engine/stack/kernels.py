# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""What a layer does between its products as Triton kernels for CUDA; float32 inside, whatever the tensors hold.

Names, arguments and results are those of tasks.engine.stack.plain, which has the formulas. A program of a backward
goes through many tokens and keeps their share of a norm weight's gradient; whoever calls sums the shares, those of all
layers at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.stack.attend import attend, attend_backward
from tasks.engine.stack.shapes import Attention, Rows

__all__ = [
    "add_norm", "add_norm_backward", "attend", "attend_backward", "gated", "gated_backward", "norm", "rotate",
    "rotate_backward",
]  # fmt: skip

PROGRAMS, HEAD_PROGRAMS = 1056, 264  # of a norm's backward, and for each head: 8 and 2 for each multiprocessor
WARPS, BACK_WARPS, GATE_WARPS = 1, 1, 4
TURN, TURN_BACK = (8, 8), (4, 2)  # tokens and warps of a program that turns heads
COLUMNS = 2048  # of a gate's program


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


def rotate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: Rows, kind: Attention) -> tuple[Tensor, Tensor]:
    """See plain.rotate."""
    tokens = len(qkv)
    q = qkv.new_empty((tokens, kind.heads, kind.width))
    k = qkv.new_empty((tokens, kind.kv_heads, kind.width))
    cos, sin = rows.tables[kind.local]
    _rotate[(triton.cdiv(tokens, TURN[0]), kind.heads + kind.kv_heads)](
        qkv, q, k, q_weight, k_weight, rows.positions, cos, sin, tokens, qkv.stride(0), kind.eps,
        HEADS=kind.heads, KV_HEADS=kind.kv_heads, HALF=kind.width // 2, TOKENS=TURN[0], num_warps=TURN[1],
    )  # fmt: skip
    return q, k


def rotate_backward(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: Rows, kind: Attention,
    shares: Tensor,
) -> None:  # fmt: skip
    """See plain.rotate_backward."""
    cos, sin = rows.tables[kind.local]
    _rotate_backward[(HEAD_PROGRAMS, kind.heads + kind.kv_heads)](
        qkv, dq, dk, q_weight, k_weight, rows.positions, cos, sin, shares, len(qkv), qkv.stride(0), kind.eps,
        HEADS=kind.heads, KV_HEADS=kind.kv_heads, HALF=kind.width // 2, TOKENS=TURN_BACK[0], num_warps=TURN_BACK[1],
    )  # fmt: skip


def gated(gate_up: Tensor) -> Tensor:
    """See plain.gated."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((tokens, width))
    grid = (tokens, triton.cdiv(width, COLUMNS))
    _gated[grid](gate_up, out, width, BLOCK=COLUMNS, num_warps=GATE_WARPS)
    return out


def gated_backward(gate_up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """See plain.gated_backward."""
    tokens, width = dh.shape
    grid = (tokens, triton.cdiv(width, COLUMNS))
    _gated_backward[grid](gate_up, dh, width, BLOCK=COLUMNS, num_warps=GATE_WARPS)
    return gate_up, dh


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


@triton.jit
def _load(tensor, at, there):
    return tl.load(tensor + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _add_norm(x, added, summed, out, gain, weight, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    there = at < width
    here = tl.program_id(0).to(tl.int64) * width + at
    value = _load(x, here, there)
    if ADDS:
        more = _load(added, here, there)
        value += more * tl.rsqrt(tl.sum(more * more) / width + eps) * (1 + _load(gain, at, there))
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + here, rounded, mask=there)
        value = rounded.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps) * (1 + _load(weight, at, there))
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


@triton.jit
def _rotate(
    qkv, q, k, q_weight, k_weight, positions, cos, sin, tokens, stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    there, at = (token < tokens)[:, None], tl.arange(0, HALF)[None, :]
    here = qkv + token.to(tl.int64)[:, None] * stride + head * 2 * HALF + at
    low = tl.load(here, mask=there, other=0.0).to(tl.float32)
    high = tl.load(here + HALF, mask=there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
    weight = q_weight
    out = q + (token.to(tl.int64)[:, None] * HEADS + head) * 2 * HALF + at
    if head >= HEADS:
        weight = k_weight
        out = k + (token.to(tl.int64)[:, None] * KV_HEADS + head - HEADS) * 2 * HALF + at
    low *= inverse * (1 + tl.load(weight + at).to(tl.float32))
    high *= inverse * (1 + tl.load(weight + HALF + at).to(tl.float32))
    place = tl.load(positions + token, mask=token < tokens, other=0)[:, None] * HALF + at
    c, s = tl.load(cos + place), tl.load(sin + place)
    tl.store(out, (low * c - high * s).to(q.dtype.element_ty), mask=there)
    tl.store(out + HALF, (high * c + low * s).to(q.dtype.element_ty), mask=there)


@triton.jit
def _rotate_backward(
    qkv, dq, dk, q_weight, k_weight, positions, cos, sin, shares, tokens, stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program, programs, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    at = tl.arange(0, HALF)[None, :]
    weight, grads = q_weight, dq
    if head >= HEADS:
        weight, grads = k_weight, dk
    heads, own = tl.where(head >= HEADS, KV_HEADS, HEADS), tl.where(head >= HEADS, head - HEADS, head)
    by_low = 1 + tl.load(weight + at).to(tl.float32)
    by_high = 1 + tl.load(weight + HALF + at).to(tl.float32)
    of_low, of_high = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
    for start in range(program * TOKENS, tokens, programs * TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = (token < tokens)[:, None]
        here = qkv + token.to(tl.int64)[:, None] * stride + head * 2 * HALF + at
        grad = grads + (token.to(tl.int64)[:, None] * heads + own) * 2 * HALF + at
        low = tl.load(here, mask=there, other=0.0).to(tl.float32)
        high = tl.load(here + HALF, mask=there, other=0.0).to(tl.float32)
        d_low = tl.load(grad, mask=there, other=0.0).to(tl.float32)
        d_high = tl.load(grad + HALF, mask=there, other=0.0).to(tl.float32)
        place = tl.load(positions + token, mask=token < tokens, other=0)[:, None] * HALF + at
        c, s = tl.load(cos + place), tl.load(sin + place)
        g_low, g_high = d_low * c + d_high * s, d_high * c - d_low * s
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low, high = low * inverse, high * inverse
        of_low += g_low * low
        of_high += g_high * high
        g_low, g_high = g_low * by_low, g_high * by_high
        mean = ((tl.sum(g_low * low, 1) + tl.sum(g_high * high, 1)) / (2 * HALF))[:, None]
        tl.store(here, (inverse * (g_low - low * mean)).to(qkv.dtype.element_ty), mask=there)
        tl.store(here + HALF, (inverse * (g_high - high * mean)).to(qkv.dtype.element_ty), mask=there)
    out = shares + (head * programs + program) * 2 * HALF + tl.arange(0, HALF)
    tl.store(out, tl.sum(of_low, 0))
    tl.store(out + HALF, tl.sum(of_high, 0))


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
    act, _ = _gelu(_load(gate_up, token * 2 * width + at, there))
    up = _load(gate_up, token * 2 * width + width + at, there)
    tl.store(out + token * width + at, (act * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _gated_backward(gate_up, dh, width, BLOCK: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, here = at < width, token * 2 * width + at
    act, slope = _gelu(_load(gate_up, here, there))
    up, grad = _load(gate_up, here + width, there), _load(dh, token * width + at, there)
    tl.store(gate_up + here, (grad * up * slope).to(gate_up.dtype.element_ty), mask=there)
    tl.store(gate_up + here + width, (grad * act).to(gate_up.dtype.element_ty), mask=there)
    tl.store(dh + token * width + at, (act * up).to(dh.dtype.element_ty), mask=there)
