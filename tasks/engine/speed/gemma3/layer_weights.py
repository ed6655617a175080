"""Weights and gradients of Gemma 3's layers as the written-out decoder multiplies them.

Queries, keys and values are one matrix, gate and up another: their rows have to be adjacent in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextModel

from tasks.engine.models.family_registry import family_of
from tasks.engine.models.lm_head import unwrap
from tasks.engine.speed.gemma3.attention_shapes import AttentionShape

ALIGNED = 64  # elements: alignment of a parameter's gradient, at which adjacent parameters have no gap


@dataclass
class LayerWeights:
    """A layer's matrices in the dtype of the products, its norms as they are stored, and the gradients of both."""

    attention: AttentionShape
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: dict[str, Tensor]
    grads: dict[str, Tensor]


class DecoderWeights(NamedTuple):
    """All layers, the final norm with its gradient and epsilon, and the module of operations between the products.

    `ops` is tasks.engine.speed.gemma3.reference_ops or .kernels.
    """

    layers: list[LayerWeights]
    norm: Tensor
    norm_grad: Tensor
    eps: float
    ops: ModuleType


def is_supported(model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype) -> bool:
    """Whether a model has Gemma 3's text layers, all trained, in sizes that the kernels take."""
    body = cast(Any, unwrap(model).base_model)
    if not family_of(body.config.model_type).handwritten_layers or type(body) is not Gemma3TextModel:
        return False
    if not all(type(layer) is Gemma3DecoderLayer for layer in body.layers):
        return False
    config = body.config
    trained = all(id(p) in grads for p in body.parameters())
    plain = not config.attention_bias and not config.attention_dropout and config.attn_logit_softcapping is None
    causal = not getattr(config, "use_bidirectional_attention", False)
    projections = [m for layer in body.layers for block in (layer.self_attn, layer.mlp) for m in _projections(block)]
    linear = all(type(m) is nn.Linear and m.weight.numel() % ALIGNED == 0 for m in projections)
    powers_of_two = (config.head_dim, config.num_attention_heads // config.num_key_value_heads)
    sizes = model.device.type == "cpu" or (
        dtype == torch.bfloat16 and all(n & (n - 1) == 0 for n in powers_of_two) and 32 <= config.head_dim <= 256
    )
    return trained and plain and causal and linear and sizes and config.hidden_activation == "gelu_pytorch_tanh"


def _projections(module: Any) -> list[Any]:
    return [child for name, child in module.named_children() if name.endswith("_proj")]


def layer_weights(layer: Any, eps: float, weights: dict[int, Tensor], grads: dict[int, Tensor]) -> LayerWeights:
    """The weights of a transformers layer; `weights` (in the products' dtype) and `grads` are by `id` of a parameter.

    Raises ValueError where matrices that are multiplied as one are not adjacent in memory.
    """
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    shape = AttentionShape(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim, float(attention.scaling),
        eps, attention.sliding_window or 0, attention.is_sliding,
    )  # fmt: skip
    groups = {"qkv": [attention.q_proj, attention.k_proj, attention.v_proj], "out": [attention.o_proj],
              "gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}  # fmt: skip
    matrices = {name: _adjacent_as_one([weights[id(m.weight)] for m in group]) for name, group in groups.items()}
    layer_grads = {name: _adjacent_as_one([grads[id(m.weight)] for m in group]) for name, group in groups.items()}
    norms = {
        "pre_attention": layer.input_layernorm, "q": attention.q_norm, "k": attention.k_norm,
        "post_attention": layer.post_attention_layernorm, "pre_mlp": layer.pre_feedforward_layernorm,
        "post_mlp": layer.post_feedforward_layernorm,
    }  # fmt: skip
    layer_grads |= {name: grads[id(module.weight)] for name, module in norms.items()}
    return LayerWeights(shape, **matrices, norms={n: m.weight.detach() for n, m in norms.items()}, grads=layer_grads)


def _adjacent_as_one(parts: Sequence[Tensor]) -> Tensor:
    """One matrix over the memory of adjacent ones, without a copy; raises ValueError where they are not adjacent."""
    first, rows = parts[0], sum(len(part) for part in parts)
    address = first.data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.shape[1] != first.shape[1]:
            raise ValueError("matrices that are multiplied as one are not adjacent in memory")
        address += part.numel() * part.element_size()
    return torch.as_strided(first, (rows, first.shape[1]), (first.shape[1], 1))
