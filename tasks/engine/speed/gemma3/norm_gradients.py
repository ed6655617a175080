"""Gradients of all norms' weights, reduced in one pass per backward from the partial sums of the kernels' programs."""

import torch
from torch import Tensor

from tasks.engine.speed.gemma3.layer_weights import DecoderWeights, LayerWeights


class NormGradients:
    """Buffers of partial sums, one slice per kernel call, and the gradients that they are reduced into."""

    def __init__(self, decoder: DecoderWeights, like: Tensor) -> None:
        ops, shape, layers = decoder.ops, decoder.layers[0].attention, len(decoder.layers)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.partials = like.new_empty((2 * layers + 1, 2, ops.PROGRAMS, like.shape[1]), dtype=dtype)
        heads = (layers, shape.heads + shape.kv_heads, ops.HEAD_PROGRAMS, shape.head_dim)
        self.head_partials = like.new_empty(heads, dtype=dtype)
        self.targets: list[tuple[Tensor, ...]] = []
        self.layers: list[LayerWeights] = []

    def norm(self, *grads: Tensor) -> Tensor:
        """Buffer (2, PROGRAMS, H) of the next call's partial sums, to be reduced into one or two norms' `grads`."""
        self.targets.append(grads)
        return self.partials[len(self.targets) - 1]

    def heads(self, layer: LayerWeights) -> Tensor:
        """Buffer (A + G, HEAD_PROGRAMS, D) of the partial sums of a layer's query and key norms."""
        self.layers.append(layer)
        return self.head_partials[len(self.layers) - 1]

    def add(self, overwrite: bool) -> None:
        """Reduces all partial sums and adds them to the gradients, or with `overwrite` replaces these."""
        norms, heads = self.partials.sum(2).unbind(), self.head_partials.sum(2)
        pairs = [
            pair for grads, sums in zip(self.targets, norms, strict=True) for pair in zip(grads, sums, strict=False)
        ]
        q_heads = self.layers[0].attention.heads
        for name, head_sums in (("q", heads[:, :q_heads].sum(1)), ("k", heads[:, q_heads:].sum(1))):
            pairs += [(layer.grads[name], sums) for layer, sums in zip(self.layers, head_sums.unbind(), strict=True)]
        write = torch._foreach_copy_ if overwrite else torch._foreach_add_
        write([grad for grad, _ in pairs], [sums for _, sums in pairs])
