# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Attention over packed rows, forward and backward: Triton kernels for short rows, torch's flash kernel for long ones.

Chat rows are a hundred tokens or two, a few blocks of a row. Here a block holds the heads that share keys side by side
(`GROUP` of them for each token), so that keys and values are read once for all, and their gradients are summed over
the heads by the product itself. Online softmax and recomputation as in FlashAttention-2 (arXiv 2307.08691).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.stack.shapes import Attention, Rows

SHORT = 512  # tokens: longer rows go to torch's kernel
# (queries times heads, keys, warps, stages) of a block
FORWARD, QUERIES, KEYS = (64, 32, 4, 2), (64, 16, 4, 3), (32, 64, 8, 3)
LOG2E = tl.constexpr(1.4426950408889634)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, kind: Attention) -> tuple[Tensor, Tensor]:
    """See plain.attend; known besides are the scores' log-sum-exps."""
    if rows.longest > SHORT:
        out, known, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v.contiguous(), rows.borders, rows.borders, rows.longest, rows.longest, 0.0, _causal(rows, kind),
            False, scale=kind.scale, **_window(rows, kind),
        )  # fmt: skip
        return out.flatten(1), known
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group, (block, keys, warps, stages) = kind.heads // kind.kv_heads, FORWARD
    block = max(block, 16 * group)
    grid = (len(rows.borders) - 1, triton.cdiv(rows.longest, block // group), kind.kv_heads)
    _forward[grid](
        q, k, v, out, lse, rows.borders, kind.scale * 1.4426950408889634, kind.window, v.stride(0), v.stride(1),
        GROUP=group, KV_HEADS=kind.kv_heads, WIDTH=kind.width, BLOCK=block, KEYS=keys, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out.flatten(1), lse


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, known: Tensor, rows: Rows, kind: Attention
) -> tuple[Tensor, Tensor]:
    """See plain.attend_backward."""
    if rows.longest > SHORT:
        nothing = torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do.view(q.shape), q, k, v.contiguous(), out.view(q.shape), known, rows.borders, rows.borders, rows.longest,
            rows.longest, 0.0, _causal(rows, kind), torch.zeros(2, dtype=torch.uint64, device=q.device), nothing,
            scale=kind.scale, **_window(rows, kind),
        )  # fmt: skip
        v.copy_(dv)
        return dq, dk
    dq, dk, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(known)
    group = kind.heads // kind.kv_heads
    same = dict(GROUP=group, KV_HEADS=kind.kv_heads, WIDTH=kind.width)
    scale, strides = kind.scale * 1.4426950408889634, (v.stride(0), v.stride(1))
    block, keys, warps, stages = QUERIES
    block = max(block, 16 * group)
    grid = (len(rows.borders) - 1, triton.cdiv(rows.longest, block // group), kind.kv_heads)
    _backward_queries[grid](
        q, k, v, out, do, known, delta, dq, rows.borders, scale, kind.scale, kind.window, *strides,
        **same, BLOCK=block, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block, keys, warps, stages = KEYS
    block = max(block, 8 * group)
    grid = (len(rows.borders) - 1, triton.cdiv(rows.longest, keys), kind.kv_heads)
    _backward_keys[grid](
        q, k, v, do, known, delta, dk, rows.borders, scale, kind.scale, kind.window, *strides,
        **same, BLOCK=block, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk


def _causal(rows: Rows, kind: Attention) -> bool:
    """What torch's kernel is told where there is no window."""
    return not 0 < kind.window < rows.longest


def _window(rows: Rows, kind: Attention) -> dict[str, int]:
    return {"window_size_left": -1 if _causal(rows, kind) else kind.window - 1, "window_size_right": 0}


@triton.jit
def _row(borders, block, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The first token of this program's row, its number of tokens, and the first query or key of its `block`."""
    start = tl.load(borders + tl.program_id(0))
    return start, tl.load(borders + tl.program_id(0) + 1) - start, block * (BLOCK // GROUP)


@triton.jit
def _turned():
    """This program's block of queries: a row's last, which sees the most keys, is begun first."""
    return tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def _of_row(k, v, start, kv, v_token, v_head, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a row's keys and values begin."""
    first = start.to(tl.int64)
    return k + (first * KV_HEADS + kv) * WIDTH, v + first * v_token + kv * v_head


@triton.jit
def _shown(token, key, length, window):
    """Which keys (columns) a query's token (lines) sees."""
    back = token[:, None] - key[None, :]
    return (back >= 0) & (key < length)[None, :] & ((window == 0) | (back < window))


@triton.jit
def _first(token, window, KEYS: tl.constexpr):
    """The first block of keys that a block of queries from `token` on sees."""
    return tl.where(window == 0, 0, tl.maximum(token - window + 1, 0)) // KEYS * KEYS


@triton.jit
def _forward(
    q, k, v, out, lse, borders, scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    start, length, first = _row(borders, _turned(), BLOCK, GROUP)
    if first >= length:
        return
    kv = tl.program_id(2)
    line, at = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    token = first + line // GROUP
    head = token * (KV_HEADS * GROUP) + line % GROUP  # (token, head) as one number, from the row's first on
    there, before = (token < length)[:, None], start.to(tl.int64) * (KV_HEADS * GROUP) + kv * GROUP
    place = head[:, None] * WIDTH + at[None, :]
    queries = tl.load(q + before * WIDTH + place, mask=there, other=0.0)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    k_row, v_row = _of_row(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    for block in range(_first(first, window, KEYS), tl.minimum(length, first + BLOCK // GROUP), KEYS):
        key = block + tl.arange(0, KEYS)
        known = (key < length)[:, None]
        keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + at[None, :], mask=known, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(_shown(token, key, length, window), scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - base[:, None])
        fade = tl.exp2(high - base)
        total = total * fade + tl.sum(shares, 1)
        values = tl.load(v_row + key[:, None] * v_token + at[None, :], mask=known, other=0.0)
        acc = acc * fade[:, None] + tl.dot(shares.to(values.dtype), values)
        high = higher
    acc = acc / total[:, None]
    tl.store(out + before * WIDTH + place, acc.to(out.dtype.element_ty), mask=there)
    tl.store(lse + before + head, high + tl.log2(total), mask=token < length)


@triton.jit
def _backward_queries(
    q, k, v, out, do, lse, delta, dq, borders, scale, plain_scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    start, length, first = _row(borders, _turned(), BLOCK, GROUP)
    if first >= length:
        return
    kv = tl.program_id(2)
    line, at = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    token = first + line // GROUP
    head = token * (KV_HEADS * GROUP) + line % GROUP
    there, before = (token < length)[:, None], start.to(tl.int64) * (KV_HEADS * GROUP) + kv * GROUP
    place = head[:, None] * WIDTH + at[None, :]
    grad = tl.load(do + before * WIDTH + place, mask=there, other=0.0)
    mean = tl.sum(grad.to(tl.float32) * tl.load(out + before * WIDTH + place, mask=there, other=0.0).to(tl.float32), 1)
    tl.store(delta + before + head, mean, mask=token < length)
    queries = tl.load(q + before * WIDTH + place, mask=there, other=0.0)
    high = tl.load(lse + before + head, mask=token < length, other=0.0)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    k_row, v_row = _of_row(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    for block in range(_first(first, window, KEYS), tl.minimum(length, first + BLOCK // GROUP), KEYS):
        key = block + tl.arange(0, KEYS)
        known = (key < length)[:, None]
        keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + at[None, :], mask=known, other=0.0)
        values = tl.load(v_row + key[:, None] * v_token + at[None, :], mask=known, other=0.0)
        scores, of_shares = tl.dot(queries, tl.trans(keys)), tl.dot(grad, tl.trans(values))
        shares = tl.where(_shown(token, key, length, window), tl.exp2(scores * scale - high[:, None]), 0.0)
        slope = shares * (of_shares - mean[:, None])
        acc += tl.dot(slope.to(keys.dtype), keys)
    tl.store(dq + before * WIDTH + place, (acc * plain_scale).to(dq.dtype.element_ty), mask=there)


@triton.jit
def _backward_keys(
    q, k, v, do, lse, delta, dk, borders, scale, plain_scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The values' gradient takes their place: no other program reads them."""
    start, length, first = _row(borders, tl.program_id(1), KEYS, 1)
    if first >= length:
        return
    kv = tl.program_id(2)
    at, key = tl.arange(0, WIDTH), first + tl.arange(0, KEYS)
    known = (key < length)[:, None]
    k_row, v_row = _of_row(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + at[None, :], mask=known, other=0.0)
    values = tl.load(v_row + key[:, None] * v_token + at[None, :], mask=known, other=0.0)
    before = start.to(tl.int64) * (KV_HEADS * GROUP) + kv * GROUP
    of_keys, of_values = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    end = tl.where(window == 0, length, tl.minimum(length, first + KEYS + window - 1))
    line = tl.arange(0, BLOCK)
    for block in range(first, end, BLOCK // GROUP):
        token = block + line // GROUP
        head = token * (KV_HEADS * GROUP) + line % GROUP
        there = token < length
        place = head[:, None] * WIDTH + at[None, :]
        queries = tl.load(q + before * WIDTH + place, mask=there[:, None], other=0.0)
        grad = tl.load(do + before * WIDTH + place, mask=there[:, None], other=0.0)
        high = tl.load(lse + before + head, mask=there, other=0.0)
        mean = tl.load(delta + before + head, mask=there, other=0.0)
        scores, of_shares = tl.dot(keys, tl.trans(queries)), tl.dot(values, tl.trans(grad))
        back = token[None, :] - key[:, None]
        shown = (back >= 0) & there[None, :] & ((window == 0) | (back < window))
        shares = tl.where(shown, tl.exp2(scores * scale - high[None, :]), 0.0)
        slope = shares * (of_shares - mean[None, :])
        of_values += tl.dot(shares.to(grad.dtype), grad)
        of_keys += tl.dot(slope.to(queries.dtype), queries)
    dk_row, v_row = _of_row(dk, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    out = key[:, None] * (KV_HEADS * WIDTH) + at[None, :]
    tl.store(dk_row + out, (of_keys * plain_scale).to(dk.dtype.element_ty), mask=known)
    tl.store(v_row + key[:, None] * v_token + at[None, :], of_values.to(v.dtype.element_ty), mask=known)
