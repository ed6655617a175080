# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""A row's logits a tile at a time, and the sums of its parts put together.

A row is cut into parts of PART columns, a program each, so that no multiprocessor waits for the last rows. A tile is
LINES x WIDE logits, and each line keeps a maximum and sums of its own until the part is over: threads do not wait for
each other, and the sums take an eighth of the registers.
"""

import triton
import triton.language as tl

WIDE = tl.constexpr(8)  # logits of a line: 16 bytes, what a thread loads at once
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def read_logits(row, cols, columns, cap, CAPPED: tl.constexpr, EVEN: tl.constexpr):
    """Logits in float32; -inf behind the last column."""
    if EVEN:
        x = tl.load(row + cols).to(tl.float32)
    else:
        x = tl.load(row + cols, mask=cols < columns, other=0.0).to(tl.float32)
    if CAPPED:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    if not EVEN:
        x = tl.where(cols < columns, x, float("-inf"))
    return x


@triton.jit
def finite(high):
    """What to subtract from a line's logits: its maximum, or 0 while it has none."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def log2_sum_exp(out, plane, which, cold, slices, SLICES: tl.constexpr):
    """log2 of a row's sum of exp over its parts, by parts' maxima in `which` and sums after it; the parts' shares."""
    at = tl.arange(0, SLICES)
    tops = tl.load(out + which * plane + at, mask=at < slices, other=float("-inf"))
    part = tl.load(out + (which + 1) * plane + at, mask=at < slices, other=0.0)
    top = tl.max(tops)
    fades = tl.exp2((tops - top) * cold)
    total = tl.sum(part * fades)
    return top * cold + tl.log2(total), fades / total
