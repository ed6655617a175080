# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Attention's forward with online softmax in base 2, a block of queries a program."""

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
def attention_forward(
    q, k, v, out, lse, cu_seqlens, scale, window, v_token, v_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Writes attention's output `out` (T, A, D) and the scores' log-sum-exps `lse` (T, A) in base 2."""
    start, length, first = block_bounds(cu_seqlens, last_block_first(), BLOCK, GROUP)
    if first >= length:
        return
    kv = tl.program_id(2)
    row, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    token = first + row // GROUP
    head = token * (KV_HEADS * GROUP) + row % GROUP  # flat (token, head) index within the row
    mask, base = (token < length)[:, None], start.to(tl.int64) * (KV_HEADS * GROUP) + kv * GROUP
    offset = head[:, None] * WIDTH + column[None, :]
    queries = tl.load(q + base * WIDTH + offset, mask=mask, other=0.0)
    row_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    k_row, v_row = kv_pointers(k, v, start, kv, v_token, v_head, KV_HEADS, WIDTH)
    for block in range(first_key_block(first, window, KEYS), tl.minimum(length, first + BLOCK // GROUP), KEYS):
        key = block + tl.arange(0, KEYS)
        key_mask = (key < length)[:, None]
        keys = tl.load(k_row + key[:, None] * (KV_HEADS * WIDTH) + column[None, :], mask=key_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(visible(token, key, length, window), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        probs = tl.exp2(scores - finite_max[:, None])
        rescale = tl.exp2(row_max - finite_max)
        total = total * rescale + tl.sum(probs, 1)
        values = tl.load(v_row + key[:, None] * v_token + column[None, :], mask=key_mask, other=0.0)
        acc = acc * rescale[:, None] + tl.dot(probs.to(values.dtype), values)
        row_max = new_max
    acc = acc / total[:, None]
    tl.store(out + base * WIDTH + offset, acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + base + head, row_max + tl.log2(total), mask=token < length)
