"""The gradients of all norms' weights: shares from each program of each kernel, summed together once a backward."""

import torch
from torch import Tensor

from tasks.engine.speed.gemma3.layer_weights import Decoder, Layer


class NormGradients:
    """The shares of all norms' gradients as the kernels' programs leave them, summed together at the end."""

    def __init__(self, decoder: Decoder, like: Tensor) -> None:
        ops, kind, layers = decoder.ops, decoder.layers[0].kind, len(decoder.layers)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.norms = like.new_empty((2 * layers + 1, 2, ops.PROGRAMS, like.shape[1]), dtype=dtype)
        heads = (layers, kind.heads + kind.kv_heads, ops.HEAD_PROGRAMS, kind.head_dim)
        self.of_heads = like.new_empty(heads, dtype=dtype)
        self.into: list[tuple[Tensor, ...]] = []
        self.layers: list[Layer] = []

    def norm(self, *into: Tensor) -> Tensor:
        """Where a kernel leaves its shares of the gradients that go `into` one norm or two."""
        self.into.append(into)
        return self.norms[len(self.into) - 1]

    def heads(self, layer: Layer) -> Tensor:
        """The same for a layer's norms of queries and keys."""
        self.layers.append(layer)
        return self.of_heads[len(self.layers) - 1]

    def add(self, fresh: bool) -> None:
        """Adds all to where they go, or puts them there."""
        norms, heads = self.norms.sum(2).unbind(), self.of_heads.sum(2)
        pairs = [pair for into, found in zip(self.into, norms, strict=True) for pair in zip(into, found, strict=False)]
        asked = self.layers[0].kind.heads
        for name, part in (("q", heads[:, :asked].sum(1)), ("k", heads[:, asked:].sum(1))):
            pairs += [(layer.grads[name], found) for layer, found in zip(self.layers, part.unbind(), strict=True)]
        move = torch._foreach_copy_ if fresh else torch._foreach_add_
        move([total for total, _ in pairs], [found for _, found in pairs])
