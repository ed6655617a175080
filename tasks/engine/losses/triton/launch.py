# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Two or three passes over a chunk's logits, launched.

One takes the maxima, the softmax sums and the divergence's value; one writes the gradient over the student's logits.
Where the teacher's sums are known, forward_kl reads the teacher in the last pass alone, which then makes its value too.
The mixtures (jsd, skew) need the sums before their value: a third, between them.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from tasks.engine.losses.loss_mix import Head, Mix
from tasks.engine.losses.triton.gradient import logits_gradient
from tasks.engine.losses.triton.mixture import mixture_values
from tasks.engine.losses.triton.sums import SUMS, softmax_sums

CODES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_kl": 3, "skew_reverse_kl": 4}
BLOCK, WARPS = 4096, 8
PART = 32768  # columns of a program


def chunk_losses(
    products: Tensor,
    head: Head,
    labels: Tensor,
    weights: Tensor,
    teacher: Tensor | None,
    teacher_softcap: float | None,
    mix: Mix,
    parts: Tensor,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tasks.engine.losses.divergence.chunk_losses`, but `products` (n, V) turns into the gradient.

    `teacher` (n, W) are products too: its softcap is applied here. `lse` (n,) is its log-sum-exp at the temperature,
    where that is known.
    """
    n, columns = products.shape
    known = products if teacher is None else teacher
    shared, slices = min(columns, known.shape[1]), triton.cdiv(columns, PART)
    numbers = torch.empty((4, n), dtype=torch.float32, device=products.device)
    sums, squares = numbers.new_empty((SUMS.value, n, slices)), numbers.new_empty((3, n, slices))
    kind = -1 if teacher is None else CODES[mix.divergence]
    mixed = numbers.new_empty((2, n, slices)) if kind > 1 else sums
    later = kind == 0 and lse is not None and shared == known.shape[1]
    same: dict[str, Any] = dict(
        n=n, student_stride=products.stride(0), teacher_stride=known.stride(0), columns=columns, shared=shared,
        temperature=mix.temperature, share=mix.beta if mix.divergence == "jsd" else mix.skew, cap=head.softcap or 1.0,
        teacher_cap=teacher_softcap or 1.0, KIND=kind, CAPPED=head.softcap is not None,
        TEACHER_CAPPED=teacher_softcap is not None, EVEN=columns % PART == 0 and shared == columns,
        PART=PART, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    quick: dict[str, Any] = dict(T_IS_2=mix.temperature == 2, T_IS_1=mix.temperature == 1)
    grid = (slices, n)
    softmax_sums[grid](products, known, labels, sums, LATER=later, **same, **quick)
    if kind > 1:
        mixture_values[grid](products, known, sums, mixed, SLICES=_power(slices), **same)
    logits_gradient[grid](
        products, known, labels, weights, parts, sums, mixed, lse if later else weights, squares, numbers,
        LATER=later, SLICES=_power(slices), **same, **quick,
    )  # fmt: skip
    found = squares.sum(-1)
    torch.sqrt(found[:2], out=numbers[2:])
    numbers[2] *= mix.temperature
    if later:
        torch.mul(found[2], mix.temperature**2, out=numbers[0])
    return products, numbers


def _power(n: int) -> int:
    return int(triton.next_power_of_2(n))
