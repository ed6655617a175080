"""Gemma 3's layers as the stack wants them: whether a model has them, and their weights and gradients as products.

Matrices that are one product (queries, keys and values; gate and up) have to lie one behind the other in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextModel

from tasks.engine.models.lm_head import unwrap
from tasks.engine.speed.gemma3.attention_shapes import Attention

ALIGNED = 64  # elements: where a parameter's gradient may begin, so that neighbours lie without a gap


@dataclass
class Layer:
    """A layer's weights: products in the dtype they are multiplied in, norms as they are; and all their gradients."""

    kind: Attention
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: dict[str, Tensor]
    grads: dict[str, Tensor]


class Decoder(NamedTuple):
    """All layers, the norm behind them and its gradient, the norms' epsilon, and what computes between products:
    tasks.engine.speed.gemma3.reference_ops or .kernels."""

    layers: list[Layer]
    norm: Tensor
    norm_grad: Tensor
    eps: float
    ops: ModuleType


def fits(model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype) -> bool:
    """Whether these are Gemma 3's text layers as the stack writes them, with all of their weights trained."""
    body = cast(Any, unwrap(model).base_model)
    if type(body) is not Gemma3TextModel or not all(type(layer) is Gemma3DecoderLayer for layer in body.layers):
        return False
    config = body.config
    whole = all(id(p) in grads for p in body.parameters())
    bare = not config.attention_bias and not config.attention_dropout and config.attn_logit_softcapping is None
    causal = not getattr(config, "use_bidirectional_attention", False)
    products = [m for layer in body.layers for part in (layer.self_attn, layer.mlp) for m in _products(part)]
    linear = all(type(m) is nn.Linear and m.weight.numel() % ALIGNED == 0 for m in products)
    powers = (config.head_dim, config.num_attention_heads // config.num_key_value_heads)
    sizes = model.device.type == "cpu" or (
        dtype == torch.bfloat16 and all(n & (n - 1) == 0 for n in powers) and 32 <= config.head_dim <= 256
    )
    return whole and bare and causal and linear and sizes and config.hidden_activation == "gelu_pytorch_tanh"


def _products(module: Any) -> list[Any]:
    return [child for name, child in module.named_children() if name.endswith("_proj")]


def layer_of(layer: Any, eps: float, weights: dict[int, Tensor], grads: dict[int, Tensor]) -> Layer:
    """A layer of transformers' with its `weights` for products and its `grads`, both by a parameter's id.

    Raises ValueError where the parts of a product do not lie one behind the other.
    """
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    kind = Attention(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim, float(attention.scaling),
        eps, attention.sliding_window or 0, attention.is_sliding,
    )  # fmt: skip
    parts = {"qkv": [attention.q_proj, attention.k_proj, attention.v_proj], "out": [attention.o_proj],
             "gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}  # fmt: skip
    found = {name: _joined([weights[id(m.weight)] for m in modules]) for name, modules in parts.items()}
    added = {name: _joined([grads[id(m.weight)] for m in modules]) for name, modules in parts.items()}
    norms = {
        "first": layer.input_layernorm, "q": attention.q_norm, "k": attention.k_norm,
        "after": layer.post_attention_layernorm, "second": layer.pre_feedforward_layernorm,
        "last": layer.post_feedforward_layernorm,
    }  # fmt: skip
    added |= {name: grads[id(module.weight)] for name, module in norms.items()}
    return Layer(kind, **found, norms={n: m.weight.detach() for n, m in norms.items()}, grads=added)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices that lie one behind the other as one; raises ValueError where they do not."""
    first, rows = parts[0], sum(len(part) for part in parts)
    at = first.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.shape[1] != first.shape[1]:
            raise ValueError("the parts of a product do not lie one behind the other")
        at += part.numel() * part.element_size()
    return torch.as_strided(first, (rows, first.shape[1]), (first.shape[1], 1))
