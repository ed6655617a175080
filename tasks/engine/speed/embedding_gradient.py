"""Embedding lookups whose backward accumulates into an existing gradient buffer.

Autograd would allocate a gradient of the vocabulary's size (V, H) for a lookup of some thousand tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tasks.engine.models.family import EMBEDDING_SCALE


class EmbeddingGradient:
    """Context in which the embedding's backward adds its gradient into an existing buffer, deterministically.

    `grads` are buffers by `id` of a parameter; without one for the embedding, or for a module that does more than look
    up and scale rows, autograd stays as it is.
    """

    def __init__(self, embedding: nn.Module, grads: dict[int, Tensor]) -> None:
        self.embedding = cast(Any, embedding)
        self.grad = grads.get(id(self.embedding.weight)) if _is_scaled_lookup(self.embedding) else None
        self.anchor = torch.zeros((), device=self.embedding.weight.device, requires_grad=True)
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        if self.grad is not None:
            self.handles = [
                self.embedding.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(False) and None),
                self.embedding.register_forward_hook(self._hook),
            ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _hook(self, module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        if torch.is_autocast_enabled("cuda"):
            output = output.to(torch.get_autocast_dtype("cuda"))
        return cast(
            Tensor,
            cast(Any, _AccumulateGradient).apply(
                self.anchor, output, arguments[0], self.grad, _scale(module), module.padding_idx
            ),
        )


class _AccumulateGradient(torch.autograd.Function):
    """The identity on an embedding's output; its backward does grad[ids] += scale * d_output.

    `anchor` requires a gradient, so that autograd calls the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, ids: Tensor, grad: Tensor, scale: float, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.grad, ctx.scale, ctx.padding = grad, scale, padding
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ids, d_output = ctx.saved_tensors[0].flatten(), grads[0].flatten(0, -2)
        if ids.is_cuda:
            from tasks.engine.speed.embedding_gradient_kernel import accumulate_rows  # noqa: PLC0415  # needs Triton

            accumulate_rows(ctx.grad, ids, d_output.contiguous(), ctx.scale, ctx.padding)
            return (None,) * 6
        d_output = d_output.float() * ctx.scale
        if ctx.padding is not None:
            d_output = d_output * (ids != ctx.padding)[:, None]
        ctx.grad.index_put_((ids,), d_output, accumulate=True)
        return (None,) * 6


def _scale(embedding: Any) -> float:
    """Factor that the module multiplies rows by (Gemma: sqrt(hidden))."""
    return float(getattr(embedding, EMBEDDING_SCALE, 1.0))


def _is_scaled_lookup(embedding: Any) -> bool:
    """Whether the module returns its weight's rows times a constant, and nothing else."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return False
    ids = torch.tensor([[1, 3, 2]], device=embedding.weight.device)
    with torch.no_grad():
        rows = embedding.weight[ids] * torch.tensor(_scale(embedding), dtype=embedding.weight.dtype)
        return torch.allclose(embedding(ids), rows, rtol=1e-5)
