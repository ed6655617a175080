"""A chunk of positions: the student's logits, and the loss's gradient in them. Plain torch, or buffers and kernels.

work = chunk_of(hidden, weight, spec)
grad = work.gradient(hidden[rows], rows, counts[rows], numbers)     # rows: work.rows positions
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from tasks.engine.losses.divergence import chunk_losses
from tasks.engine.losses.gradient_accumulation import Fresh
from tasks.engine.losses.loss_mix import Head, Mix, TopK

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


class TorchChunk:
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


class KernelChunk:
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
        """As in `TorchChunk`; the gradient lives in the buffer of the student's logits."""
        from tasks.engine.losses import triton  # noqa: PLC0415  # Triton is where CUDA is

        spec, n, known = self.spec, len(hidden), None
        products = torch.mm(hidden, self.weight.T, out=self.student[:n])
        softcap = spec.teacher_head.softcap if spec.teacher_head else None
        for start in range(0, n, n if self.teacher_weight is None else self.together):
            part = slice(start, n if self.teacher_weight is None else min(n, start + self.together))
            here = slice(rows.start + part.start, rows.start + part.stop)
            if self.teacher_weight is not None:
                states = cast(Tensor, spec.teacher)[here].to(hidden.dtype)
                known = torch.mm(states, self.teacher_weight.T, out=self.teacher[: len(states)])
            _, numbers[:, here] = triton.chunk_losses(
                products[part], Head(self.weight, spec.softcap), spec.labels[here], counts[part], known, softcap,
                spec.mix, spec.parts, None if spec.lse is None else spec.lse[here],
            )  # fmt: skip
        return products


def _even(positions: int, most: int) -> int:
    """Rows of pieces of about the same size, none above `most`, in whole tiles where they can be."""
    most = most // TILE * TILE or most
    pieces = max(1, -(-positions // most))
    return max(1, min(most, -(-positions // pieces // TILE) * TILE))


def chunk_of(hidden: Tensor, weight: Tensor, spec: Spec) -> TorchChunk | KernelChunk:
    """What makes the gradients of `hidden` (N, H), `rows` positions at a time: the Triton kernels serve bfloat16 on
    CUDA, and no top k."""
    has_kernel = hidden.is_cuda and hidden.dtype == torch.bfloat16 and not isinstance(spec.teacher, TopK)
    return (KernelChunk if has_kernel else TorchChunk)(weight, spec, len(hidden))
