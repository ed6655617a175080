"""A chunk of positions: the student's logits and the loss's gradient in them, by plain torch or by Triton kernels.

chunk = make_chunk(hidden, weight, inputs)
grad = chunk.gradient(hidden[rows], rows, counts[rows], losses)     # rows: chunk.rows positions
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import OverwriteBuffer
from tasks.engine.losses.loss_mix import Head, LossMix, TopK
from tasks.engine.losses.plain_loss import chunk_losses

IGNORE = -100
TILE = 128  # rows of a tile in a matrix product
TEACHER_ROWS = 512  # rows of the teacher's logits at a time: enough for its product to run at its full rate


class LossInputs(NamedTuple):
    """Non-differentiable inputs of the chunked loss; see `chunked.distillation`."""

    labels: Tensor
    label_weights: Tensor | None
    softcap: float | None
    teacher: Tensor | TopK | None
    teacher_head: Head | None
    mix: LossMix
    part_weights: Tensor
    chunk_bytes: int
    head_grad: Tensor | OverwriteBuffer | None
    teacher_lse: Tensor | None


class PlainChunk:
    """Plain torch: float32 logits (float64 stays so), their gradient and a few temporaries in `chunk_bytes`."""

    def __init__(self, weight: Tensor, inputs: LossInputs, _: int) -> None:
        self.weight, self.inputs = weight, inputs
        floats = 4 if inputs.teacher is None else 8
        self.rows = max(1, inputs.chunk_bytes // (floats * 4 * len(weight)))

    def gradient(self, hidden: Tensor, rows: slice, counts: Tensor, losses: Tensor) -> Tensor:
        """The gradient (C, V) in hidden @ weight.T, in the dtype of `hidden` (C, H).

        Writes kd, ce, kd_norm and ce_norm of positions `rows` into `losses` (4, N). `counts` (C,) weight the gradient;
        it is 0 where they are, whatever those positions hold.
        """
        inputs, teacher = self.inputs, self.inputs.teacher
        if isinstance(teacher, TopK):
            distribution: Tensor | TopK | None = TopK(*(field[rows] for field in teacher))
        else:
            distribution = None if teacher is None else cast(Head, inputs.teacher_head).logits(teacher[rows])
        products = (hidden @ self.weight.T).to(losses.dtype)
        labels = inputs.labels[rows].clamp(min=0)
        grad, losses[:, rows] = chunk_losses(
            products, Head(self.weight, inputs.softcap), labels, counts, distribution, inputs.mix, inputs.part_weights
        )
        return grad.masked_fill_((counts == 0)[:, None], 0).to(hidden.dtype)


class TritonChunk:
    """CUDA: half-precision logits of student and teacher in two buffers of `chunk_bytes` together.

    The student's, which turns into the gradient, is the larger one: each product for the head's gradient reads and
    writes all of that in float32, and should have many rows. The teacher's is filled again for some rows at a time.
    """

    def __init__(self, weight: Tensor, inputs: LossInputs, positions: int) -> None:
        self.weight, self.inputs = weight, inputs
        self.teacher_weight = None
        row_bytes, teacher_row_bytes = weight.element_size() * len(weight), 0
        if inputs.teacher_head is not None:
            self.teacher_weight = inputs.teacher_head.weight.to(weight.dtype)
            teacher_row_bytes = weight.element_size() * len(self.teacher_weight)
        teacher_rows = max(1, min(TEACHER_ROWS, inputs.chunk_bytes // (row_bytes + teacher_row_bytes)))
        student_bytes = inputs.chunk_bytes - teacher_rows * teacher_row_bytes
        self.rows = _even_rows(positions, max(1, student_bytes // row_bytes))
        self.teacher_rows = _even_rows(self.rows, teacher_rows)
        self.student_logits = torch.empty((self.rows, len(weight)), dtype=weight.dtype, device=weight.device)
        if self.teacher_weight is not None:
            self.teacher_logits = self.student_logits.new_empty((self.teacher_rows, len(self.teacher_weight)))

    def gradient(self, hidden: Tensor, rows: slice, counts: Tensor, losses: Tensor) -> Tensor:
        """As `PlainChunk.gradient`; the gradient lives in the buffer of the student's logits."""
        from tasks.engine.losses import triton  # noqa: PLC0415  # Triton is where CUDA is

        inputs, n, teacher_logits = self.inputs, len(hidden), None
        products = torch.mm(hidden, self.weight.T, out=self.student_logits[:n])
        softcap = inputs.teacher_head.softcap if inputs.teacher_head else None
        step = n if self.teacher_weight is None else self.teacher_rows
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            positions = slice(rows.start + part.start, rows.start + part.stop)
            if self.teacher_weight is not None:
                states = cast(Tensor, inputs.teacher)[positions].to(hidden.dtype)
                teacher_logits = torch.mm(states, self.teacher_weight.T, out=self.teacher_logits[: len(states)])
            _, losses[:, positions] = triton.chunk_losses(
                products[part], Head(self.weight, inputs.softcap), inputs.labels[positions], counts[part],
                teacher_logits, softcap, inputs.mix, inputs.part_weights,
                None if inputs.teacher_lse is None else inputs.teacher_lse[positions],
            )  # fmt: skip
        return products


def _even_rows(positions: int, limit: int) -> int:
    """Rows of pieces of about the same size, none above `limit`, in whole tiles where they can be."""
    limit = limit // TILE * TILE or limit
    pieces = max(1, -(-positions // limit))
    return max(1, min(limit, -(-positions // pieces // TILE) * TILE))


def make_chunk(hidden: Tensor, weight: Tensor, inputs: LossInputs) -> PlainChunk | TritonChunk:
    """The chunk for `hidden` (N, H): Triton kernels for bfloat16 on CUDA and a divergence that has one, but no top k;
    plain torch for all else."""
    has_kernel = hidden.is_cuda and hidden.dtype == torch.bfloat16 and not isinstance(inputs.teacher, TopK)
    has_kernel &= inputs.teacher is None or inputs.mix.kernel is not None
    return (TritonChunk if has_kernel else PlainChunk)(weight, inputs, len(hidden))
