# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Attention's backward: one kernel for queries (a block of them a program), one for keys and values.

P = exp2(scale S - lse)     delta = sum(O * dO)     dS = P * (dO V' - delta)     dQ = dS K     dK = dS' Q     dV = P' dO
"""

import triton
import triton.language as tl

from tasks.engine.speed.gemma3.kernels.attention_blocks import (
    block_bounds,
    first_key_block,
    kv_pointers,
    last_block_first,
    visible,
)


@triton.jit
def attention_backward_queries(
    q, k, v, out, d_out, lse, delta, d_q, cu_seqlens, scale, plain_scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes `d_q`, and `delta` (T, A) for the keys' kernel."""
    start, length, first = block_bounds(cu_seqlens, last_block_first(), BLOCK, GROUP)
    if first >= length:
        return
    kv = tl.program_id(2)
    row, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    token = first + row // GROUP
    head = token * (KV_HEADS * GROUP) + row % GROUP
    mask, base = (token < length)[:, None], start.to(tl.int64) * (KV_HEADS * GROUP) + kv * GROUP
    offset = head[:, None] * WIDTH + column[None, :]
    grad = tl.load(d_out + base * WIDTH + offset, mask=mask, other=0.0)
    row_delta = tl.sum(
        grad.to(tl.float32) * tl.load(out + base * WIDTH + offset, mask=mask, other=0.0).to(tl.float32), 1
    )
    tl.store(delta + base + head, row_delta, mask=token < length)
    queries = tl.load(q + base * WIDTH + offset, mask=mask, other=0.0)
    row_lse = tl.load(lse + base + head, mask=token < length, other=0.0)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    k_row, v_row = kv_pointers(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    for block in range(first_key_block(first, window, KEYS), tl.minimum(length, first + BLOCK // GROUP), KEYS):
        key = block + tl.arange(0, KEYS)
        key_mask = (key < length)[:, None]
        keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + column[None, :], mask=key_mask, other=0.0)
        values = tl.load(v_row + key[:, None] * v_token + column[None, :], mask=key_mask, other=0.0)
        scores, d_probs = tl.dot(queries, tl.trans(keys)), tl.dot(grad, tl.trans(values))
        probs = tl.where(visible(token, key, length, window), tl.exp2(scores * scale - row_lse[:, None]), 0.0)
        d_scores = probs * (d_probs - row_delta[:, None])
        acc += tl.dot(d_scores.to(keys.dtype), keys)
    tl.store(d_q + base * WIDTH + offset, (acc * plain_scale).to(d_q.dtype.element_ty), mask=mask)


@triton.jit
def attention_backward_keys(
    q, k, v, d_out, lse, delta, d_k, cu_seqlens, scale, plain_scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes `d_k`, and the values' gradient into `v`, which no other program reads."""
    start, length, first = block_bounds(cu_seqlens, tl.program_id(1), KEYS, 1)
    if first >= length:
        return
    kv = tl.program_id(2)
    column, key = tl.arange(0, WIDTH), first + tl.arange(0, KEYS)
    key_mask = (key < length)[:, None]
    k_row, v_row = kv_pointers(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + column[None, :], mask=key_mask, other=0.0)
    values = tl.load(v_row + key[:, None] * v_token + column[None, :], mask=key_mask, other=0.0)
    base = start.to(tl.int64) * (KV_HEADS * GROUP) + kv * GROUP
    acc_k, acc_v = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    end = tl.where(window == 0, length, tl.minimum(length, first + KEYS + window - 1))
    row = tl.arange(0, BLOCK)
    for block in range(first, end, BLOCK // GROUP):
        token = block + row // GROUP
        head = token * (KV_HEADS * GROUP) + row % GROUP
        mask = token < length
        offset = head[:, None] * WIDTH + column[None, :]
        queries = tl.load(q + base * WIDTH + offset, mask=mask[:, None], other=0.0)
        grad = tl.load(d_out + base * WIDTH + offset, mask=mask[:, None], other=0.0)
        row_lse = tl.load(lse + base + head, mask=mask, other=0.0)
        row_delta = tl.load(delta + base + head, mask=mask, other=0.0)
        scores, d_probs = tl.dot(keys, tl.trans(queries)), tl.dot(values, tl.trans(grad))
        distance = token[None, :] - key[:, None]
        visible_keys = (distance >= 0) & mask[None, :] & ((window == 0) | (distance < window))
        probs = tl.where(visible_keys, tl.exp2(scores * scale - row_lse[None, :]), 0.0)
        d_scores = probs * (d_probs - row_delta[None, :])
        acc_v += tl.dot(probs.to(grad.dtype), grad)
        acc_k += tl.dot(d_scores.to(queries.dtype), queries)
    dk_row, v_row = kv_pointers(d_k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    out = key[:, None] * (KV_HEADS * WIDTH) + column[None, :]
    tl.store(dk_row + out, (acc_k * plain_scale).to(d_k.dtype.element_ty), mask=key_mask)
    tl.store(v_row + key[:, None] * v_token + column[None, :], acc_v.to(v.dtype.element_ty), mask=key_mask)
