"""Look-ups in an embedding whose gradient goes straight to its place."""

from typing import Any, cast

import torch
from torch import Tensor, nn


class Look:
    """While it is entered, the input embedding adds its gradient into a buffer itself, in one product's order.

    Autograd would make a gradient as large as the vocabulary for a look-up of some thousand rows.
    """

    def __init__(self, embedding: nn.Module, grads: dict[int, Tensor]) -> None:
        self.embedding = cast(Any, embedding)
        self.into = grads.get(id(self.embedding.weight)) if _is_scaled_look_up(self.embedding) else None
        self.anchor = torch.zeros((), device=self.embedding.weight.device, requires_grad=True)
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        if self.into is not None:
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
            cast(Any, _Looked).apply(self.anchor, output, arguments[0], self.into, _scale(module), module.padding_idx),
        )


class _Looked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, output: Tensor, ids: Tensor, into: Tensor, scale: float, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.into, ctx.scale, ctx.padding = into, scale, padding
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ids, added = ctx.saved_tensors[0].flatten(), grads[0].flatten(0, -2)
        if ids.is_cuda:
            from tasks.engine.speed.embedding_gradient_kernel import add_rows  # noqa: PLC0415  # Triton is where CUDA is

            add_rows(ctx.into, ids, added.contiguous(), ctx.scale, ctx.padding)
            return (None,) * 6
        added = added.float() * ctx.scale
        if ctx.padding is not None:
            added = added * (ids != ctx.padding)[:, None]
        ctx.into.index_put_((ids,), added, accumulate=True)
        return (None,) * 6


def _scale(embedding: Any) -> float:
    """What a row is multiplied by on its way out (Gemma: sqrt(hidden))."""
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def _is_scaled_look_up(embedding: Any) -> bool:
    """Whether the module gives its weight's rows times a number, and nothing else."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return False
    ids = torch.tensor([[1, 3, 2]], device=embedding.weight.device)
    with torch.no_grad():
        rows = embedding.weight[ids] * torch.tensor(_scale(embedding), dtype=embedding.weight.dtype)
        return torch.allclose(embedding(ids), rows, rtol=1e-5)
