# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Launches the two or three kernels that turn a chunk's logits into the loss and its gradient.

The first takes the maxima, the softmax sums and the divergence's value, the last writes the gradient over the student's
logits. Where the teacher's log-sum-exps are known, forward_kl reads the teacher in the last kernel alone, which then
makes its value too. The mixtures (jsd, skew) need the sums before their value: a third kernel, between them.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from tasks.engine.losses.loss_mix import Head, LossMix
from tasks.engine.losses.triton.gradient import logits_gradient
from tasks.engine.losses.triton.mixture import mixture_values
from tasks.engine.losses.triton.sums import SUMS, softmax_sums

BLOCK, WARPS = 4096, 8
PART = 32768  # columns of a program


def chunk_losses(
    products: Tensor,
    head: Head,
    labels: Tensor,
    label_weights: Tensor,
    teacher: Tensor | None,
    teacher_softcap: float | None,
    mix: LossMix,
    part_weights: Tensor,
    teacher_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tasks.engine.losses.plain_loss.chunk_losses`, but `products` (C, V) turns into the gradient.

    `teacher` (C, W) are products too: its softcap is applied here. `teacher_lse` (C,) is its log-sum-exp at the
    temperature, where that is known. Raises ValueError for a divergence that has no kernel.
    """
    kind = -1 if teacher is None else mix.kernel
    if kind is None:
        raise ValueError(f"divergence={mix.divergence} has no Triton kernel: it takes plain_loss.chunk_losses")
    n, columns = products.shape
    teacher_products = products if teacher is None else teacher  # not read without a teacher
    teacher_columns = teacher_products.shape[1]
    shared, slices = min(columns, teacher_columns), triton.cdiv(columns, PART)
    losses = torch.empty((4, n), dtype=torch.float32, device=products.device)
    sums, squares = losses.new_empty((SUMS.value, n, slices)), losses.new_empty((3, n, slices))
    is_mixture = kind > 1
    mixed = losses.new_empty((2, n, slices)) if is_mixture else sums
    has_lse = kind == 0 and teacher_lse is not None and shared == teacher_columns
    settings: dict[str, Any] = dict(
        n=n, student_stride=products.stride(0), teacher_stride=teacher_products.stride(0), columns=columns,
        shared=shared, temperature=mix.temperature, share=next(iter(mix.arguments().values()), 0.0),
        cap=head.softcap or 1.0, teacher_cap=teacher_softcap or 1.0, KIND=kind, CAPPED=head.softcap is not None,
        TEACHER_CAPPED=teacher_softcap is not None, EVEN=columns % PART == 0 and shared == columns,
        PART=PART, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    flags: dict[str, Any] = dict(T_IS_2=mix.temperature == 2, T_IS_1=mix.temperature == 1, HAS_LSE=has_lse)
    grid = (slices, n)
    softmax_sums[grid](products, teacher_products, labels, sums, **settings, **flags)
    if is_mixture:
        mixture_values[grid](products, teacher_products, sums, mixed, SLICES=_power_of_2(slices), **settings)
    logits_gradient[grid](
        products, teacher_products, labels, label_weights, part_weights, sums, mixed,
        teacher_lse if has_lse else label_weights, squares, losses, SLICES=_power_of_2(slices), **settings, **flags,
    )  # fmt: skip
    row_sums = squares.sum(-1)
    torch.sqrt(row_sums[:2], out=losses[2:])
    losses[2] *= mix.temperature
    if has_lse:
        torch.mul(row_sums[2], mix.temperature**2, out=losses[0])
    return products, losses


def _power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))
