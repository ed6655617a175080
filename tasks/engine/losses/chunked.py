"""Losses that never hold (positions x vocabulary): logits live a chunk of positions at a time.

The gradient is made in the forward pass, while a chunk's logits are there; backward only scales it. On a CUDA device
with half-precision states a chunk is two matrix products, one Triton kernel that turns the student's logits into their
gradient in place, and two products more, the head's summed in float32 by the product itself.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tasks.engine.losses.divergence import chunk_losses
from tasks.engine.losses.mix import Head, Losses, Mix, TopK
from tasks.engine.products import Fresh, add_product

IGNORE = -100
TILE = 128  # a matrix product's rows are worked on in tiles of this many
TOGETHER = 512  # rows whose logits the teacher makes at once: enough for a product to run at its full rate


class Spec(NamedTuple):
    """All that is no student's tensor. `parts` (2,) are the weights of divergence and cross-entropy."""

    labels: Tensor
    weights: Tensor | None
    softcap: float | None
    teacher: Tensor | TopK | None
    teacher_head: Head | None
    mix: Mix
    parts: Tensor
    chunk_bytes: int
    into: Tensor | Fresh | None
    lse: Tensor | None


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
        chunk = _KernelChunk if _has_kernel(hidden, spec) else _TorchChunk
        work = chunk(cast_weight, spec, len(hidden))
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


class _TorchChunk:
    """The plain path: float32 logits (float64 stays so), their gradient and a few temporaries in `chunk_bytes`."""

    def __init__(self, weight: Tensor, spec: Spec, _: int) -> None:
        self.weight, self.spec = weight, spec
        width = 4 if spec.teacher is None else 8
        self.rows = max(1, spec.chunk_bytes // (width * 4 * len(weight)))

    def gradient(self, hidden: Tensor, rows: slice, counts: Tensor, numbers: Tensor) -> Tensor:
        """The gradient (n, V) in the products, in the hidden states' dtype; the positions' numbers are written."""
        spec, teacher = self.spec, self.spec.teacher
        if isinstance(teacher, TopK):
            known: Tensor | TopK | None = TopK(*(part[rows] for part in teacher))
        else:
            known = None if teacher is None else cast(Head, spec.teacher_head).logits(teacher[rows])
        products = (hidden @ self.weight.T).to(numbers.dtype)
        labels = spec.labels[rows].clamp(min=0)
        grad, numbers[:, rows] = chunk_losses(
            products, Head(self.weight, spec.softcap), labels, counts, known, spec.mix, spec.parts
        )
        return grad.masked_fill_((counts == 0)[:, None], 0).to(hidden.dtype)


class _KernelChunk:
    """CUDA: half-precision logits of student and teacher in two buffers of `chunk_bytes` together.

    The student's, which turns into the gradient, is the larger one: each product for the head's gradient reads and
    writes all of that in float32, and should have many rows. The teacher's is filled again for some rows at a time.
    """

    def __init__(self, weight: Tensor, spec: Spec, positions: int) -> None:
        self.weight, self.spec = weight, spec
        self.teacher_weight = None
        width, known = weight.element_size() * len(weight), 0
        if spec.teacher_head is not None:
            self.teacher_weight = spec.teacher_head.weight.to(weight.dtype)
            known = weight.element_size() * len(self.teacher_weight)
        self.together = max(1, min(TOGETHER, spec.chunk_bytes // (width + known)))
        self.rows = _even(positions, max(1, (spec.chunk_bytes - self.together * known) // width))
        self.together = _even(self.rows, self.together)
        self.student = torch.empty((self.rows, len(weight)), dtype=weight.dtype, device=weight.device)
        if self.teacher_weight is not None:
            self.teacher = self.student.new_empty((self.together, len(self.teacher_weight)))

    def gradient(self, hidden: Tensor, rows: slice, counts: Tensor, numbers: Tensor) -> Tensor:
        """As in `_TorchChunk`; the gradient lives in the buffer of the student's logits."""
        from tasks.engine.losses import kernel  # noqa: PLC0415  # Triton is where CUDA is

        spec, n, known = self.spec, len(hidden), None
        products = torch.mm(hidden, self.weight.T, out=self.student[:n])
        softcap = spec.teacher_head.softcap if spec.teacher_head else None
        for start in range(0, n, n if self.teacher_weight is None else self.together):
            part = slice(start, n if self.teacher_weight is None else min(n, start + self.together))
            here = slice(rows.start + part.start, rows.start + part.stop)
            if self.teacher_weight is not None:
                states = cast(Tensor, spec.teacher)[here].to(hidden.dtype)
                known = torch.mm(states, self.teacher_weight.T, out=self.teacher[: len(states)])
            _, numbers[:, here] = kernel.chunk_losses(
                products[part], Head(self.weight, spec.softcap), spec.labels[here], counts[part], known, softcap,
                spec.mix, spec.parts, None if spec.lse is None else spec.lse[here],
            )  # fmt: skip
        return products


def _even(positions: int, most: int) -> int:
    """Rows of pieces of about the same size, none above `most`, in whole tiles where they can be."""
    most = most // TILE * TILE or most
    pieces = max(1, -(-positions // most))
    return max(1, min(most, -(-positions // pieces // TILE) * TILE))


def _has_kernel(hidden: Tensor, spec: Spec) -> bool:
    """Whether the Triton kernel serves: bfloat16 on CUDA, and no top k."""
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and not isinstance(spec.teacher, TopK)
