# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Attention's gradients: the queries' a block of queries a program, then the keys' and values' a block of keys."""

import triton
import triton.language as tl

from tasks.engine.speed.gemma3.kernels.attention_blocks import (
    first_keys,
    keys_and_values_of,
    longest_first,
    row_of,
    visible,
)


@triton.jit
def attention_backward_queries(
    q, k, v, out, do, lse, delta, dq, borders, scale, plain_scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes `dq`, and `delta` (T, A), the sum of `out` times its gradient, which the keys' kernel reads."""
    start, length, first = row_of(borders, longest_first(), BLOCK, GROUP)
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
    k_row, v_row = keys_and_values_of(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    for block in range(first_keys(first, window, KEYS), tl.minimum(length, first + BLOCK // GROUP), KEYS):
        key = block + tl.arange(0, KEYS)
        known = (key < length)[:, None]
        keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + at[None, :], mask=known, other=0.0)
        values = tl.load(v_row + key[:, None] * v_token + at[None, :], mask=known, other=0.0)
        scores, of_shares = tl.dot(queries, tl.trans(keys)), tl.dot(grad, tl.trans(values))
        shares = tl.where(visible(token, key, length, window), tl.exp2(scores * scale - high[:, None]), 0.0)
        slope = shares * (of_shares - mean[:, None])
        acc += tl.dot(slope.to(keys.dtype), keys)
    tl.store(dq + before * WIDTH + place, (acc * plain_scale).to(dq.dtype.element_ty), mask=there)


@triton.jit
def attention_backward_keys(
    q, k, v, do, lse, delta, dk, borders, scale, plain_scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The values' gradient takes their place: no other program reads them."""
    start, length, first = row_of(borders, tl.program_id(1), KEYS, 1)
    if first >= length:
        return
    kv = tl.program_id(2)
    at, key = tl.arange(0, WIDTH), first + tl.arange(0, KEYS)
    known = (key < length)[:, None]
    k_row, v_row = keys_and_values_of(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
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
    dk_row, v_row = keys_and_values_of(dk, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    out = key[:, None] * (KV_HEADS * WIDTH) + at[None, :]
    tl.store(dk_row + out, (of_keys * plain_scale).to(dk.dtype.element_ty), mask=known)
    tl.store(v_row + key[:, None] * v_token + at[None, :], of_values.to(v.dtype.element_ty), mask=known)
