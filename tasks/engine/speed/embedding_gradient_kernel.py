# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The gradient of an embedding's look-ups as a Triton kernel: each id's tokens are summed by one program, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOGETHER = 16  # tokens that a program reads at once


def add_rows(into: Tensor, ids: Tensor, grads: Tensor, scale: float, padding: int | None) -> None:
    """into[ids] += grads * scale, into (V, H) float32, ids (T,), grads (T, H); tokens of the id `padding` bring
    nothing. The same sum every time."""
    ids, order = torch.sort(ids.int(), stable=True)
    width = grads.shape[1]
    _add_rows[(len(ids),)](
        into, ids, order, grads, len(ids), width, scale, -1 if padding is None else padding, TOGETHER=TOGETHER,
        BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip


@triton.jit
def _add_rows(into, ids, order, grads, tokens, width, scale, padding, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0)
    own = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if (own == before) | (own == padding):  # the program of the id's first token adds them all
        return
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < width
        total, place, more = tl.zeros((BLOCK,), tl.float32), first, True
        while more:
            token = place + tl.arange(0, TOGETHER)
            same = tl.load(ids + token, mask=token < tokens, other=-1) == own
            row = tl.load(order + token, mask=same, other=0)
            part = tl.load(grads + row[:, None] * width + at[None, :], mask=same[:, None] & there[None, :], other=0.0)
            total += tl.sum(part.to(tl.float32), 0)
            place += TOGETHER
            more = tl.sum(same.to(tl.int32)) == TOGETHER
        out = into + own.to(tl.int64) * width + at
        tl.store(out, tl.load(out, mask=there) + total * scale, mask=there)
