# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Attention's output and the scores' log-sum-exps (base 2), a block of queries a program."""

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
def attention_forward(
    q, k, v, out, lse, borders, scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes `out` (T, A, D) and `lse` (T, A)."""
    start, length, first = row_of(borders, longest_first(), BLOCK, GROUP)
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
    k_row, v_row = keys_and_values_of(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    for block in range(first_keys(first, window, KEYS), tl.minimum(length, first + BLOCK // GROUP), KEYS):
        key = block + tl.arange(0, KEYS)
        known = (key < length)[:, None]
        keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + at[None, :], mask=known, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(visible(token, key, length, window), scores, float("-inf"))
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
