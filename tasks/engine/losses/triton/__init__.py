"""The formulas as Triton kernels for CUDA: a chunk's logits of student and teacher in, the gradient in their place."""

from tasks.engine.losses.triton.launch import chunk_losses

__all__ = ["chunk_losses"]
