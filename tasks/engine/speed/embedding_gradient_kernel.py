# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""The gradient of embedding lookups as a Triton kernel: one program sums the tokens of each id, in a fixed order.

grad_V[ids_T[t]] += scale * grads_T[t]        # V vocabulary, T tokens, H hidden
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # tokens that a program reads at once


def accumulate_rows(total: Tensor, ids: Tensor, grads: Tensor, scale: float, padding: int | None) -> None:
    """total[ids] += grads * scale of total (V, H) float32, ids (T,) and grads (T, H), leaving out the id `padding`.

    Deterministic: the sum of an id's tokens does not depend on the schedule of programs.
    """
    ids, order = torch.sort(ids.int(), stable=True)
    width = grads.shape[1]
    _accumulate_rows[(len(ids),)](
        total, ids, order, grads, len(ids), width, scale, -1 if padding is None else padding, TOKENS=TOKENS,
        BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip


@triton.jit
def _accumulate_rows(
    total, ids, order, grads, tokens, width, scale, padding, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0)
    token_id = tl.load(ids + first)
    previous_id = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if (token_id == previous_id) | (token_id == padding):  # the program of the id's first token adds them all
        return
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < width
        acc, position, unfinished = tl.zeros((BLOCK,), tl.float32), first, True
        while unfinished:
            token = position + tl.arange(0, TOKENS)
            same = tl.load(ids + token, mask=token < tokens, other=-1) == token_id
            row = tl.load(order + token, mask=same, other=0)
            grad = tl.load(
                grads + row[:, None] * width + column[None, :], mask=same[:, None] & mask[None, :], other=0.0
            )
            acc += tl.sum(grad.to(tl.float32), 0)
            position += TOKENS
            unfinished = tl.sum(same.to(tl.int32)) == TOKENS
        out = total + token_id.to(tl.int64) * width + column
        tl.store(out, tl.load(out, mask=mask) + acc * scale, mask=mask)
