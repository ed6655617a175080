"""Gemma 3's decoder layers with a hand-written forward and backward, for full training in bfloat16 on one GPU.

    decoder = Gemma3Decoder.of(model, grads)    # None for another model; grads: float32 gradients by id of a parameter
    decoder.refresh()                           # at a step's start: copies the weights to bfloat16
    hidden = decoder(batch, embedded)           # as tasks.engine.models.lm_head.hidden_states; backward adds to `grads`

One kernel runs between two matrix products (tasks.engine.speed.gemma3.kernels); queries, keys and values are one
product, gate and up another. tasks.engine.speed.gemma3.autograd has the formulas, .reference_ops the operations in
plain torch for CPU tests.
"""

from types import ModuleType
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.engine.data.collator import Batch
from tasks.engine.models.lm_head import decoder_layers, unwrap
from tasks.engine.speed.gemma3 import reference_ops
from tasks.engine.speed.gemma3.attention_shapes import PackedRows
from tasks.engine.speed.gemma3.autograd import decode
from tasks.engine.speed.gemma3.layer_weights import DecoderWeights, is_supported, layer_weights


class Gemma3Decoder:
    """The decoder layers of one model; `weights` are its trained parameters in `dtype`, views of one buffer."""

    def __init__(self, model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype, ops: ModuleType) -> None:
        self.body = cast(Any, unwrap(model).base_model)
        self.dtype = dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = dict[int, Tensor]()
        self.flat_weights = torch.empty(sum(p.numel() for p in self.parameters), dtype=dtype, device=model.device)
        start = 0
        for p in self.parameters:
            self.weights[id(p)] = self.flat_weights[start : start + p.numel()].view(p.shape)
            start += p.numel()
        eps, norm = float(self.body.config.rms_norm_eps), self.body.norm.weight
        layers = [layer_weights(layer, eps, self.weights, grads) for layer in decoder_layers(model)]
        self.decoder_weights = DecoderWeights(layers, norm.detach(), grads[id(norm)], eps, ops)
        self.head_weight = self.weights.get(id(cast(Any, unwrap(model)).get_output_embeddings().weight))
        self._rope_tables: dict[int, dict[bool, tuple[Tensor, Tensor]]] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype) -> Self | None:
        """The decoder of a supported model, else None."""
        if not is_supported(model, grads, dtype):
            return None
        ops: ModuleType = reference_ops
        if model.device.type == "cuda":
            from tasks.engine.speed.gemma3 import kernels as ops  # noqa: PLC0415  # Triton is where CUDA is
        return cls(model, grads, dtype, ops)

    def refresh(self) -> None:
        """Copies the parameters into `weights`."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights.values()), [p.detach() for p in self.parameters])

    def rows(self, batch: Batch) -> PackedRows:
        """Layout of a batch's rows; a padded batch has rows of equal length."""
        ids, positions, cu_seqlens = batch["input_ids"], batch["position_ids"], batch["cu_seqlens"]
        if positions is None or cu_seqlens is None:
            count, length = ids.shape
            positions = torch.arange(length, device=ids.device).repeat(count)
            cu_seqlens = torch.arange(0, ids.numel() + 1, length, device=ids.device, dtype=torch.int32)
        longest = batch["longest"]
        if longest not in self._rope_tables:
            self._rope_tables[longest] = self._rope_table(longest)
        return PackedRows(positions.flatten(), cu_seqlens, longest, self._rope_tables[longest])

    def _rope_table(self, longest: int) -> dict[bool, tuple[Tensor, Tensor]]:
        """Cosines and sines (longest, D / 2) of positions in float32, by whether a layer is local."""
        config, tables = self.body.config, {}
        like = torch.zeros(1, dtype=torch.float32, device=self.flat_weights.device)
        for layer_type in set(config.layer_types):
            cos_sin = self.body.rotary_emb(like, torch.arange(longest, device=like.device)[None], layer_type)
            tables[layer_type == "sliding_attention"] = tuple(x[0, :, : x.shape[-1] // 2].contiguous() for x in cos_sin)
        return cast(dict[bool, tuple[Tensor, Tensor]], tables)

    def __call__(self, batch: Batch, embedded: Tensor, overwrite: bool = False) -> Tensor:
        """Final hidden states (N, H) at the batch's labelled positions, from embedded tokens (..., H).

        The backward adds to the layers' gradients, or with `overwrite` replaces them.
        """
        with torch.autocast(embedded.device.type, enabled=False):
            rows, x = self.rows(batch), embedded.flatten(0, -2).to(self.dtype)
            return decode(x, self.decoder_weights, rows, batch["positions"], overwrite)
