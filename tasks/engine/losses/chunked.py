"""Cross-entropy and distillation from hidden states, with logits for a chunk of positions at a time.

The gradient is made in the forward pass, while a chunk's logits are there; backward only scales it. On a CUDA device
with half-precision states a chunk is two matrix products, Triton kernels that turn the student's logits into their
gradient in place, and two products more, the head's summed in float32 by the product itself. A divergence without a
kernel, and the top k of a teacher, take plain torch on every device.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import OverwriteBuffer, add_product
from tasks.engine.losses.logits_chunk import IGNORE, LossInputs, make_chunk
from tasks.engine.losses.loss_mix import Head, Losses, LossMix, TopK

CHUNK_BYTES = 1 << 28


def cross_entropy(
    hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int = CHUNK_BYTES,
    head_grad: Tensor | OverwriteBuffer | None = None,
) -> Tensor:  # fmt: skip
    """Summed cross-entropy -log softmax(head(hidden))[label] of hidden states (N, H); a label of -100 counts nothing.

    `head_grad` as in `distillation`.
    """
    mix = LossMix(0, 1)
    weights = mix.weights(hidden.device)
    inputs = LossInputs(labels, None, head.softcap, None, None, mix, weights, chunk_bytes, head_grad, None)
    return _summed(hidden, head, inputs).loss


def distillation(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Tensor | TopK,
    teacher_head: Head | None,
    mix: LossMix,
    chunk_bytes: int = CHUNK_BYTES,
    label_weights: Tensor | None = None,
    part_weights: Tensor | None = None,
    head_grad: Tensor | OverwriteBuffer | None = None,
    teacher_lse: Tensor | None = None,
) -> Losses:
    """Summed kd_weight * T^2 * D(p, q) + ce_weight * cross-entropy of hidden states (N, H); see `LossMix`.

    `teacher` is its hidden states (N, G), turned into p by its frozen head, or the top k of its logits. Where one
    vocabulary is padded (262208 rows beside 262144) the divergence compares the shared columns, each side normalised
    over them; cross-entropy sees all of the student's. `label_weights` (N,) count a position more or less, labels of
    -100 not at all. `part_weights` (2,), a tensor, replaces the two weights in `mix`.

    `head_grad`, float32 (V, H), accumulates the head's gradient of the sum in the products themselves, an
    `OverwriteBuffer` is overwritten; the head then gets none from backward, and `loss` has to be what backward is
    called on. `teacher_lse` (N,), the log-sum-exp of the teacher's logits / T over all its columns, saves work.
    """
    weights = mix.weights(hidden.device) if part_weights is None else part_weights
    inputs = LossInputs(
        labels, label_weights, head.softcap, teacher, teacher_head, mix, weights, chunk_bytes, head_grad, teacher_lse
    )
    return _summed(hidden, head, inputs)


def _summed(hidden: Tensor, head: Head, inputs: LossInputs) -> Losses:
    if bool(torch.is_autocast_enabled(hidden.device.type)):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        kd, ce, kd_norm, ce_norm, carrier = _apply(hidden, head.weight, inputs)
    kd_weight, ce_weight = inputs.part_weights.unbind()
    # The carrier is 0 and brings the gradient.
    return Losses((kd_weight * kd + ce_weight * ce).to(kd.dtype) + carrier, kd, ce, kd_norm, ce_norm)


class _ChunkedLoss(torch.autograd.Function):
    """Sums over the positions, and the gradients in hidden states (N, H) and head weight (V, H), chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, inputs: LossInputs) -> tuple[Tensor, ...]:
        cast_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        buffer = inputs.head_grad if isinstance(inputs.head_grad, OverwriteBuffer) else None
        grad_weight = buffer.grad if buffer else cast(Tensor | None, inputs.head_grad)
        if inputs.head_grad is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=exact)
        counts = (inputs.labels != IGNORE).to(exact)
        if inputs.label_weights is not None:
            counts = counts * inputs.label_weights
        losses = torch.zeros((4, len(hidden)), dtype=exact, device=hidden.device)
        chunk = make_chunk(hidden, cast_weight, inputs)
        for start in range(0, len(hidden), chunk.rows):
            rows = slice(start, start + chunk.rows)
            grad = chunk.gradient(hidden[rows], rows, counts[rows], losses)
            torch.mm(grad, cast_weight, out=grad_hidden[rows])
            if grad_weight is not None:
                add_product(grad_weight, grad.T, hidden[rows], overwrite=buffer is not None and start == 0)
        if buffer:
            buffer.written = len(hidden) > 0
        sums = torch.where(counts != 0, losses * counts, 0).sum(1)
        ctx.save_for_backward(grad_hidden, None if inputs.head_grad is not None else grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(*(kd_and_ce := sums.unbind()))
        return (*kd_and_ce, torch.zeros((), dtype=exact, device=hidden.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else grad_weight.mul_(grads[-1]).to(ctx.weight_dtype)
        return grads[-1].to(grad_hidden.dtype) * grad_hidden, scaled, None


_apply = cast(Any, _ChunkedLoss.apply)
