# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Tiles of a row's logits, and the reduction of its parts' sums.

A row is cut into parts of PART columns, a program each, so that no multiprocessor waits for the last rows. A tile is
LINES x WIDE logits, and each line has a running maximum and sums until the part is over: threads do not wait for each
other, and the sums take an eighth of the registers.
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
    """The maximum to subtract from a line's logits before exp; 0 where it is -inf."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def log2_sum_exp(out, plane, plane_index, log2_scale, slices, SLICES: tl.constexpr):
    """log2 of a row's sum of exp, and each part's share of it.

    Of the parts' maxima in plane `plane_index` and their sums in the next one.
    """
    index = tl.arange(0, SLICES)
    tops = tl.load(out + plane_index * plane + index, mask=index < slices, other=float("-inf"))
    part = tl.load(out + (plane_index + 1) * plane + index, mask=index < slices, other=0.0)
    top = tl.max(tops)
    rescaled = tl.exp2((tops - top) * log2_scale)
    total = tl.sum(part * rescaled)
    return top * log2_scale + tl.log2(total), rescaled / total
