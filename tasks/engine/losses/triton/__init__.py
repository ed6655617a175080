"""Triton kernels of the loss: a chunk's logits of student and teacher in, the gradient in the student's place."""

from tasks.engine.losses.triton.launch import chunk_losses

__all__ = ["chunk_losses"]
