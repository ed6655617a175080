"""Losses that never hold (positions x vocabulary): logits live a chunk of positions at a time.

The gradient is made in the forward pass, while a chunk's logits are there; backward only scales it. On a CUDA device
with half-precision states a chunk is two matrix products, Triton kernels that turn the student's logits into their
gradient in place, and two products more, the head's summed in float32 by the product itself.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import Fresh, add_product
from tasks.engine.losses.logits_chunk import IGNORE, Spec, chunk_of
from tasks.engine.losses.loss_mix import Head, Losses, Mix, TopK


def cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int = 1 << 28, into: Tensor | Fresh | None = None
) -> Tensor:
    """Summed cross-entropy of hidden states (N, H) with labels (N,); a label of -100 counts nothing.

    `into` as in `distillation`.
    """
    return _run(hidden, head, labels, None, None, None, Mix(0, 1), None, chunk_bytes, into, None).loss


def distillation(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Tensor | TopK,
    teacher_head: Head | None,
    mix: Mix,
    chunk_bytes: int = 1 << 28,
    weights: Tensor | None = None,
    parts: Tensor | None = None,
    into: Tensor | Fresh | None = None,
    lse: Tensor | None = None,
) -> Losses:
    """Distillation of the teacher's (N, G) states through its frozen head, or of its top k, mixed with cross-entropy.

    Where one vocabulary is padded (262208 rows beside 262144) the divergence compares the shared columns, each side
    normalised over them; cross-entropy sees all of the student's. `weights` (N,) count a position more or less,
    labels of -100 not at all. `parts` (2,), a tensor, goes before the weights in `mix`.

    `into`, float32 (V, H), takes the head's gradient of the sum by addition, or `Fresh`, in the products themselves;
    the head then gets none from backward, and `loss` has to be what backward is called on.

    `lse` (N,), the log-sum-exp of the teacher's logits / T over all its columns, saves work where it is known.
    """
    return _run(hidden, head, labels, weights, teacher, teacher_head, mix, parts, chunk_bytes, into, lse)


def _run(
    hidden: Tensor, head: Head, labels: Tensor, weights: Tensor | None, teacher: Tensor | TopK | None,
    teacher_head: Head | None, mix: Mix, parts: Tensor | None, chunk_bytes: int, into: Tensor | Fresh | None,
    lse: Tensor | None,
) -> Losses:  # fmt: skip
    if bool(torch.is_autocast_enabled(hidden.device.type)):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    parts = mix.weights(hidden.device) if parts is None else parts
    spec = Spec(labels, weights, head.softcap, teacher, teacher_head, mix, parts, chunk_bytes, into, lse)
    with torch.autocast(hidden.device.type, enabled=False):
        kd, ce, kd_norm, ce_norm, carrier = _apply(hidden, head.weight, spec)
    # The carrier is 0 and brings the gradient.
    return Losses((parts[0] * kd + parts[1] * ce).to(kd.dtype) + carrier, kd, ce, kd_norm, ce_norm)


class _Chunked(torch.autograd.Function):
    """Sums over the positions, and the gradients in hidden states and head weight, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        cast_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        fresh = spec.into if isinstance(spec.into, Fresh) else None
        grad_weight = fresh.total if fresh else cast(Tensor | None, spec.into)
        if spec.into is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=exact)
        counts = (spec.labels != IGNORE).to(exact)
        if spec.weights is not None:
            counts = counts * spec.weights
        numbers = torch.zeros((4, len(hidden)), dtype=exact, device=hidden.device)
        work = chunk_of(hidden, cast_weight, spec)
        for start in range(0, len(hidden), work.rows):
            rows = slice(start, start + work.rows)
            grad = work.gradient(hidden[rows], rows, counts[rows], numbers)
            torch.mm(grad, cast_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                add_product(grad_weight, grad.T, hidden[rows], fresh=fresh is not None and start == 0)
        if fresh:
            fresh.taken = len(hidden) > 0
        sums = torch.where(counts != 0, numbers * counts, 0).sum(1)
        ctx.save_for_backward(grad_hidden, None if spec.into is not None else grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(*(parts := sums.unbind()))
        return (*parts, torch.zeros((), dtype=exact, device=hidden.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else grad_weight.mul_(grads[-1]).to(ctx.weight_dtype)
        return grads[-1].to(grad_hidden.dtype) * grad_hidden, scaled, None


_apply = cast(Any, _Chunked.apply)
