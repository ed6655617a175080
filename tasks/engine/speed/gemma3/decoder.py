"""Gemma 3's layers written out, forward and backward, for training all of their weights in bfloat16 on one card.

    stack = Stack.of(model, grads)      # None where the model is another one; grads: each parameter's, float32
    stack.refresh()                     # at a step's start: the weights in bfloat16
    hidden = stack(batch, embedded)     # as tasks.engine.models.lm_head.hidden_states; backward adds to `grads` in
    place

What is between two products is one kernel (tasks.engine.speed.gemma3.kernels). Queries, keys and values are one
product, gate
and up another. The same formulas in plain torch serve the CPU (tests), where nothing is won.
"""

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.engine.data.collator import Batch
from tasks.engine.models.lm_head import layers_of, unwrap
from tasks.engine.speed.gemma3 import reference_ops
from tasks.engine.speed.gemma3.attention_shapes import Rows
from tasks.engine.speed.gemma3.autograd import decode
from tasks.engine.speed.gemma3.layer_weights import Decoder, fits, layer_of


class Stack:
    """The layers of one model. `weights` are the trained parameters in `dtype`, in one buffer."""

    def __init__(self, model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype, ops: ModuleType) -> None:
        self.body = cast(Any, unwrap(model).base_model)
        self.dtype = dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = dict[int, Tensor]()
        self.flat = torch.empty(sum(p.numel() for p in self.parameters), dtype=dtype, device=model.device)
        start = 0
        for p in self.parameters:
            self.weights[id(p)] = self.flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
        eps, norm = float(self.body.config.rms_norm_eps), self.body.norm.weight
        layers = [layer_of(layer, eps, self.weights, grads) for layer in layers_of(model)]
        self.decoder = Decoder(layers, norm.detach(), grads[id(norm)], eps, ops)
        self.head = self.weights.get(id(cast(Any, unwrap(model)).get_output_embeddings().weight))
        self._tables: dict[int, dict[bool, tuple[Tensor, Tensor]]] = {}

    @staticmethod
    def of(model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype) -> "Stack | None":
        """The stack of a model that it is right for."""
        if not fits(model, grads, dtype):
            return None
        ops: ModuleType = reference_ops
        if model.device.type == "cuda":
            from tasks.engine.speed.gemma3 import kernels as ops  # noqa: PLC0415  # Triton is where CUDA is
        return Stack(model, grads, dtype, ops)

    def refresh(self) -> None:
        """The products' weights as they are now."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights.values()), [p.detach() for p in self.parameters])

    def rows(self, batch: Batch) -> Rows:
        """The batch's rows; padded ones are rows of equal length."""
        ids, positions, borders = batch["input_ids"], batch["position_ids"], batch["cu_seqlens"]
        if positions is None or borders is None:
            count, length = ids.shape
            positions = torch.arange(length, device=ids.device).repeat(count)
            borders = torch.arange(0, ids.numel() + 1, length, device=ids.device, dtype=torch.int32)
        longest = batch["longest"]
        if longest not in self._tables:
            self._tables[longest] = self._angles(longest)
        return Rows(positions.flatten(), borders, longest, self._tables[longest])

    def _angles(self, longest: int) -> dict[bool, tuple[Tensor, Tensor]]:
        """Cosines and sines of positions below `longest` for local and global layers, in float32."""
        config, found = self.body.config, {}
        like = torch.zeros(1, dtype=torch.float32, device=self.flat.device)
        for layer_type in set(config.layer_types):
            both = self.body.rotary_emb(like, torch.arange(longest, device=like.device)[None], layer_type)
            found[layer_type == "sliding_attention"] = tuple(x[0, :, : x.shape[-1] // 2].contiguous() for x in both)
        return cast(dict[bool, tuple[Tensor, Tensor]], found)

    def __call__(self, batch: Batch, embedded: Tensor, fresh: bool = False) -> Tensor:
        """Final hidden states (N, H) at the batch's positions, of embedded tokens (..., H). With `fresh` the backward
        puts the layers' gradients in the place of what is there."""
        with torch.autocast(embedded.device.type, enabled=False):
            rows, x = self.rows(batch), embedded.flatten(0, -2).to(self.dtype)
            return decode(x, self.decoder, rows, batch["positions"], fresh)
