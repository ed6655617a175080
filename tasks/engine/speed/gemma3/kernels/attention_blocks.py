# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Where a program of attention works: its row, its block of queries or keys, and which keys a query sees."""

import triton
import triton.language as tl


@triton.jit
def row_of(borders, block, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The first token of this program's row, its number of tokens, and the first query or key of its `block`."""
    start = tl.load(borders + tl.program_id(0))
    return start, tl.load(borders + tl.program_id(0) + 1) - start, block * (BLOCK // GROUP)


@triton.jit
def longest_first():
    """This program's block of queries: a row's last, which sees the most keys, is begun first."""
    return tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def keys_and_values_of(k, v, start, kv, v_token, v_head, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a row's keys and values begin."""
    first = start.to(tl.int64)
    return k + (first * KV_HEADS + kv) * WIDTH, v + first * v_token + kv * v_head


@triton.jit
def visible(token, key, length, window):
    """Which keys (columns) a query's token (lines) sees."""
    back = token[:, None] - key[None, :]
    return (back >= 0) & (key < length)[None, :] & ((window == 0) | (back < window))


@triton.jit
def first_keys(token, window, KEYS: tl.constexpr):
    """The first block of keys that a block of queries from `token` on sees."""
    return tl.where(window == 0, 0, tl.maximum(token - window + 1, 0)) // KEYS * KEYS
