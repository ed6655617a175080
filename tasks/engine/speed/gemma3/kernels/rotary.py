# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Queries and keys: normed a head, and turned by their positions (rotary embeddings, arXiv 2104.09864)."""

import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.gemma3.attention_shapes import Attention, Rows

HEAD_PROGRAMS = 264  # of the backward, for each head: 2 for each multiprocessor
TURN, TURN_BACK = (8, 8), (4, 2)  # tokens and warps of a program that turns heads


def rotate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: Rows, kind: Attention) -> tuple[Tensor, Tensor]:
    """See plain.rotate."""
    tokens = len(qkv)
    q = qkv.new_empty((tokens, kind.heads, kind.head_dim))
    k = qkv.new_empty((tokens, kind.kv_heads, kind.head_dim))
    cos, sin = rows.tables[kind.local]
    _rotate[(triton.cdiv(tokens, TURN[0]), kind.heads + kind.kv_heads)](
        qkv, q, k, q_weight, k_weight, rows.positions, cos, sin, tokens, qkv.stride(0), kind.eps,
        HEADS=kind.heads, KV_HEADS=kind.kv_heads, HALF=kind.head_dim // 2, TOKENS=TURN[0], num_warps=TURN[1],
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
        HEADS=kind.heads, KV_HEADS=kind.kv_heads, HALF=kind.head_dim // 2, TOKENS=TURN_BACK[0], num_warps=TURN_BACK[1],
    )  # fmt: skip


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
