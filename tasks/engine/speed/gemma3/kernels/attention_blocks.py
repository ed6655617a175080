# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Indexing of the attention kernels: a program's row and block, pointers to keys and values, and the causal mask."""

import triton
import triton.language as tl


@triton.jit
def block_bounds(cu_seqlens, block, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """First token and length of the program's row, and the first query or key of its block."""
    start = tl.load(cu_seqlens + tl.program_id(0))
    return start, tl.load(cu_seqlens + tl.program_id(0) + 1) - start, block * (BLOCK // GROUP)


@triton.jit
def last_block_first():
    """The program's block of queries, counted from the row's end: the last has the most keys, so it starts first."""
    return tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def kv_pointers(k, v, start, kv, v_token, v_head, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to the first key and value of a row's key/value head."""
    first_token = start.to(tl.int64)
    return k + (first_token * KV_HEADS + kv) * WIDTH, v + first_token * v_token + kv * v_head


@triton.jit
def visible(token, key, length, window):
    """Mask (queries, keys) of the keys that each query attends to."""
    distance = token[:, None] - key[None, :]
    return (distance >= 0) & (key < length)[None, :] & ((window == 0) | (distance < window))


@triton.jit
def first_key_block(token, window, KEYS: tl.constexpr):
    """First key, in whole blocks, within the window of queries from `token` on."""
    return tl.where(window == 0, 0, tl.maximum(token - window + 1, 0)) // KEYS * KEYS
