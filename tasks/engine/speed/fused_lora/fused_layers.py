"""Fuses the LoRA projections of a model's layers: q/k/v as one product, gate/up as another, the MLP as one operator.

    groups = fuse_adapters(model)      # after peft; a hook copies the adapters into the groups before each forward

A gated MLP or an attention module is replaced by a fused one that has the same children under the same names, so peft's
parameter names stay. The replacement is compared with the original on random input first; where they differ, and in any
other layer with an adapter, single projections are fused instead. Adapters with dropout, DoRA or biases stay peft's. A
fused model is for training: its adapters cannot be disabled or merged.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tasks.engine.distributed.fsdp import shard_layers
from tasks.engine.models.lm_head import decoder_layers, unwrap
from tasks.engine.speed.fp8.matmul import MULTIPLE
from tasks.engine.speed.fused_lora.group import ADAPTER, LoraGroup, refresh_adapters
from tasks.engine.speed.fused_lora.mlp import gated_mlp
from tasks.engine.speed.fused_lora.nf4_dequantize import nf4_parts

FP8_TOLERANCE = 0.15  # relative to the largest output: each product rounds to 4 bits, a few hundred of them average out


class FusionOptions(NamedTuple):
    """How fused layers run.

    `save_gate_up`: see tasks.engine.speed.fused_lora.mlp. `fp8`: the MLPs' frozen weights are multiplied in 8 bits.
    `sharded`: frozen weights are parameters that FSDP2 shards.
    """

    save_gate_up: bool = True
    fp8: bool = False
    sharded: bool = False


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), as one operator where F is the largest dimension and the activation SiLU or GELU."""

    NAMES = ("gate_proj", "up_proj", "down_proj", "act_fn")

    def __init__(self, mlp: nn.Module, options: FusionOptions) -> None:
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, getattr(mlp, name))
        members = [cast(Any, getattr(self, name)) for name in self.NAMES[:3]]
        bases = [member.get_base_layer() for member in members]
        self.save_gate_up, self.silu = options.save_gate_up, isinstance(self.act_fn, (nn.SiLU, SiLUActivation))
        known_activation = self.silu or isinstance(self.act_fn, GELUTanh)
        same_rank = len({member.r[ADAPTER] for member in members}) == 1 and all(base.bias is None for base in bases)
        inputs, ffn = bases[0].in_features, bases[2].in_features
        self.is_single_operation = known_activation and same_rank and inputs <= 2 * ffn and bases[2].out_features < ffn
        fp8_fits = inputs % MULTIPLE == ffn % MULTIPLE == 0 and all(base.weight.is_floating_point() for base in bases)
        self.fp8 = options.fp8 and self.is_single_operation and fp8_fits
        self.gate_up, self.down = (LoraGroup(group, self.fp8, options.sharded) for group in (members[:2], members[2:]))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        if self.is_single_operation:
            flat = x.flatten(0, -2).to(self.gate_up.lora_a.dtype)
            y = gated_mlp(flat, self.gate_up, self.down, self.silu, self.save_gate_up)
            return cast(Tensor, y.unflatten(0, x.shape[:-1]))
        gate, up = self.gate_up(x)
        return cast(Tensor, self.down(cast(Any, self.act_fn)(gate) * up)[0])


class FusedAttention(nn.Module):
    """Attention of Llama, Qwen and Gemma 3 (some with query and key norms), with q, k and v as one product."""

    NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
    NORMS = ("q_norm", "k_norm")

    def __init__(self, attention: Any, options: FusionOptions) -> None:
        super().__init__()
        for name in (*self.NAMES, *(norm for norm in self.NORMS if hasattr(attention, norm))):
            setattr(self, name, getattr(attention, name))
        self.config, self.head_dim, self.scaling = attention.config, attention.head_dim, attention.scaling
        self.dropout, self.is_causal = attention.attention_dropout, attention.is_causal
        self.num_key_value_groups = attention.num_key_value_groups
        self.sliding_window = getattr(attention, "sliding_window", None)
        self.rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.qkv = LoraGroup([cast(LoraLayer, getattr(self, name)) for name in self.NAMES[:3]], sharded=options.sharded)
        self.output = LoraGroup([cast(LoraLayer, self.o_proj)], sharded=options.sharded)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, H) -> (B, L, H), and attention weights where the implementation returns them."""
        if past_key_values is not None:
            raise ValueError("a fused model is for training: set use_cache=False")
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (projection.reshape(shape) for projection in self.qkv(hidden_states))
        if hasattr(self, "q_norm"):
            query, key = cast(Any, self.q_norm)(query), cast(Any, self.k_norm)(key)
        query, key, value = (projection.transpose(1, 2) for projection in (query, key, value))
        query, key = self.rotate(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.output(out.reshape(*hidden_states.shape[:-1], -1))[0], weights


def fuse_adapters(
    model: PreTrainedModel, save_gate_up: bool = True, fp8: bool = False, sharded: bool = False,
    dtype: torch.dtype | None = None,
) -> list[LoraGroup]:  # fmt: skip
    """Fuses a model's plain LoRA adapters and returns the groups, none for a model without such adapters.

    `save_gate_up`, `fp8`, `sharded`: see `FusionOptions`. `sharded` also shards the layers over the processes, which in
    full training gather weights in `dtype`.
    """
    options = FusionOptions(save_gate_up, fp8, sharded)
    for parent in list(unwrap(model).modules()):
        for name, child in list(parent.named_children()):
            fused_class = _fused_class(child)
            fused = _tested_replacement(child, fused_class, options) if fused_class else None
            if fused is not None:
                setattr(parent, name, fused)
    groups = [module for module in unwrap(model).modules() if isinstance(module, LoraGroup)]
    grouped = {id(member) for group in groups for member in group.members}
    for module in list(unwrap(model).modules()):
        if id(module) not in grouped and _is_plain_lora(module):
            groups.append(_fuse_single(cast(LoraLayer, module), sharded))
    body = unwrap(model).base_model
    if sharded:
        base_weights = {id(member.get_base_layer().weight) for group in groups for member in group.members}
        unsharded = [p for p in body.parameters() if groups and (p.requires_grad or id(p) in base_weights)]
        shard_layers(body, decoder_layers(model), unsharded, dtype if unwrap(model) is model else None)
    if groups:  # before FSDP2's own hook, which starts to gather weights
        body.register_forward_pre_hook(lambda *_: refresh_adapters(groups), prepend=True)
    return groups


def _fuse_single(layer: LoraLayer, sharded: bool) -> LoraGroup:
    group = LoraGroup([layer], sharded=sharded)
    module = cast(Any, layer)
    module.add_module("fused", group)
    module.forward = lambda x: group(x)[0].to(x.dtype)
    return group


def _fused_class(module: nn.Module) -> Callable[[Any, FusionOptions], nn.Module] | None:
    """The fused class whose children a module has, or None."""
    names = {name for name, _ in module.named_children()}
    if names == set(FusedMLP.NAMES) and _share_rank(module, FusedMLP.NAMES[:2]) and _is_plain_lora(module.down_proj):
        return FusedMLP
    attention = names - set(FusedAttention.NORMS) == set(FusedAttention.NAMES)
    if attention and _share_rank(module, FusedAttention.NAMES[:3]) and _is_plain_lora(module.o_proj):
        return FusedAttention
    return None


def _is_plain_lora(module: Any) -> bool:
    """Whether a module has a LoRA adapter that can be fused: no dropout, DoRA or bias, on a dense or NF4 base."""
    if not isinstance(module, LoraLayer) or list(module.active_adapters) != [ADAPTER] or module.merged:
        return False
    base = cast(Any, module.get_base_layer())
    plain = not module.lora_variant and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    dense = type(base) is nn.Linear and not getattr(module, "fan_in_fan_out", False)
    quantized = type(base).__name__ == "Linear4bit" and nf4_parts(base.weight) is not None
    return plain and cast(Any, module).lora_B[ADAPTER].bias is None and (dense or quantized)


def _share_rank(parent: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether all named children have plain adapters of the same rank on bases of the same dtype."""
    children = [cast(Any, getattr(parent, name)) for name in names]
    if not all(_is_plain_lora(child) for child in children):
        return False
    return len({(child.r[ADAPTER], child.get_base_layer().weight.dtype) for child in children}) == 1


@torch.no_grad()
def _tested_replacement(
    module: Any, fused_class: Callable[[Any, FusionOptions], nn.Module], options: FusionOptions
) -> nn.Module | None:
    """The fused module if it computes what the original does on random input; else None, with the original restored."""
    weights = {name: parameter.data for name, parameter in module.named_parameters()}
    base_layer = next(module.children()).get_base_layer()
    dtype = base_layer.weight.dtype if base_layer.weight.is_floating_point() else base_layer.weight.quant_state.dtype
    x = torch.randn(1, 8, base_layer.in_features, dtype=dtype, device=base_layer.weight.device)
    inputs: tuple[Any, ...] = (x,)
    if fused_class is FusedAttention:
        angle = torch.randn(1, 8, module.head_dim // 2, device=x.device).repeat(1, 1, 2)
        inputs = (x, (angle.cos().to(dtype), angle.sin().to(dtype)), None)
    training = module.training
    try:
        expected = _first(module.eval()(*inputs))
        fused = fused_class(module, options).eval()
        refresh_adapters(group for group in fused.modules() if isinstance(group, LoraGroup))
        output = _first(fused(*inputs))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        output = torch.full_like(x, torch.nan)
    finally:
        module.train(training)
    tolerance = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    if options.fp8 and fused_class is FusedMLP:
        tolerance = FP8_TOLERANCE
    if torch.allclose(output, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        return fused.train(training)
    for name, parameter in module.named_parameters():
        parameter.data = weights[name]
    return None


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
