# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""RMS norm of each query and key head, and rotary position embedding (arXiv 2104.09864), in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.gemma3.attention_shapes import AttentionShape, PackedRows

HEAD_PROGRAMS = 264  # of the backward, per head: 2 per multiprocessor
FORWARD, BACKWARD = (8, 8), (4, 2)  # tokens and warps of a program


def norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: PackedRows, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """See reference_ops.norm_rotate."""
    tokens = len(qkv)
    q = qkv.new_empty((tokens, shape.heads, shape.head_dim))
    k = qkv.new_empty((tokens, shape.kv_heads, shape.head_dim))
    cos, sin = rows.rope_tables[shape.is_local]
    _norm_rotate[(triton.cdiv(tokens, FORWARD[0]), shape.heads + shape.kv_heads)](
        qkv, q, k, q_weight, k_weight, rows.positions, cos, sin, tokens, qkv.stride(0), shape.eps,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, HALF=shape.head_dim // 2, TOKENS=FORWARD[0], num_warps=FORWARD[1],
    )  # fmt: skip
    return q, k


def norm_rotate_backward(
    d_q: Tensor, d_k: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: PackedRows, shape: AttentionShape,
    partials: Tensor,
) -> None:  # fmt: skip
    """See reference_ops.norm_rotate_backward."""
    cos, sin = rows.rope_tables[shape.is_local]
    _norm_rotate_backward[(HEAD_PROGRAMS, shape.heads + shape.kv_heads)](
        qkv, d_q, d_k, q_weight, k_weight, rows.positions, cos, sin, partials, len(qkv), qkv.stride(0), shape.eps,
        HEADS=shape.heads, KV_HEADS=shape.kv_heads, HALF=shape.head_dim // 2, TOKENS=BACKWARD[0], num_warps=BACKWARD[1],
    )  # fmt: skip


@triton.jit
def _norm_rotate(
    qkv, q, k, q_weight, k_weight, positions, cos, sin, tokens, stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    mask, column = (token < tokens)[:, None], tl.arange(0, HALF)[None, :]
    source = qkv + token.to(tl.int64)[:, None] * stride + head * 2 * HALF + column
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
    weight = q_weight
    out = q + (token.to(tl.int64)[:, None] * HEADS + head) * 2 * HALF + column
    if head >= HEADS:
        weight = k_weight
        out = k + (token.to(tl.int64)[:, None] * KV_HEADS + head - HEADS) * 2 * HALF + column
    low *= inverse * (1 + tl.load(weight + column).to(tl.float32))
    high *= inverse * (1 + tl.load(weight + HALF + column).to(tl.float32))
    angle = tl.load(positions + token, mask=token < tokens, other=0)[:, None] * HALF + column
    cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
    tl.store(out, (low * cosine - high * sine).to(q.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (high * cosine + low * sine).to(q.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rotate_backward(
    qkv, d_q, d_k, q_weight, k_weight, positions, cos, sin, partials, tokens, stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    program, programs, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    column = tl.arange(0, HALF)[None, :]
    weight, grads = q_weight, d_q
    if head >= HEADS:
        weight, grads = k_weight, d_k
    heads, head_in_group = tl.where(head >= HEADS, KV_HEADS, HEADS), tl.where(head >= HEADS, head - HEADS, head)
    gain_low = 1 + tl.load(weight + column).to(tl.float32)
    gain_high = 1 + tl.load(weight + HALF + column).to(tl.float32)
    d_weight_low, d_weight_high = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
    for start in range(program * TOKENS, tokens, programs * TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = (token < tokens)[:, None]
        source = qkv + token.to(tl.int64)[:, None] * stride + head * 2 * HALF + column
        grad = grads + (token.to(tl.int64)[:, None] * heads + head_in_group) * 2 * HALF + column
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        d_low = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
        d_high = tl.load(grad + HALF, mask=mask, other=0.0).to(tl.float32)
        angle = tl.load(positions + token, mask=token < tokens, other=0)[:, None] * HALF + column
        cosine, sine = tl.load(cos + angle), tl.load(sin + angle)
        g_low, g_high = d_low * cosine + d_high * sine, d_high * cosine - d_low * sine
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low, high = low * inverse, high * inverse
        d_weight_low += g_low * low
        d_weight_high += g_high * high
        g_low, g_high = g_low * gain_low, g_high * gain_high
        mean = ((tl.sum(g_low * low, 1) + tl.sum(g_high * high, 1)) / (2 * HALF))[:, None]
        tl.store(source, (inverse * (g_low - low * mean)).to(qkv.dtype.element_ty), mask=mask)
        tl.store(source + HALF, (inverse * (g_high - high * mean)).to(qkv.dtype.element_ty), mask=mask)
    out = partials + (head * programs + program) * 2 * HALF + tl.arange(0, HALF)
    tl.store(out, tl.sum(d_weight_low, 0))
    tl.store(out + HALF, tl.sum(d_weight_high, 0))
