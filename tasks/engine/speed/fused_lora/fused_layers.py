"""Decoder layers whose projections work in groups: q/k/v as one, gate/up as one (tasks.engine.speed.fused_lora.linear).

    groups = fuse_adapters(model)      # after peft; before each forward its hook refreshes the groups

A gated MLP or an attention is replaced by one of ours with the same children under the same names, so peft's
parameters keep their places. Ours are tried against the original on random input first; what differs, and any other
layer with an adapter, keeps its own forward and has its single projections fused. Dropout, DoRA and biases of adapters
stay with peft. A fused model is for training: its adapters cannot be switched off or merged.
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

from tasks.engine.distributed.fsdp import split_layers
from tasks.engine.models.lm_head import layers_of, unwrap
from tasks.engine.speed.fp8.matmul import MULTIPLE
from tasks.engine.speed.fused_lora.group import ADAPTER, LoraGroup, refresh
from tasks.engine.speed.fused_lora.mlp import gated_mlp
from tasks.engine.speed.fused_lora.nf4_dequantize import nf4_parts

FP8_NEAR = 0.15  # of the largest output: each product rounds to 4 bits, a few hundred of them average out


class How(NamedTuple):
    """How groups are run: `keep` as in tasks.engine.speed.fused_lora.mlp, `fp8` multiplies the MLPs' frozen weights
    in 8 bits,
    `split` leaves the groups' weights as parameters, for fsdp2 to split."""

    keep: bool = True
    fp8: bool = False
    split: bool = False


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); as one operation where the middle is the widest part and the activation known."""

    NAMES = ("gate_proj", "up_proj", "down_proj", "act_fn")

    def __init__(self, mlp: nn.Module, how: "How") -> None:
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, getattr(mlp, name))
        members = [cast(Any, getattr(self, name)) for name in self.NAMES[:3]]
        bases = [member.get_base_layer() for member in members]
        self.keep, self.silu = how.keep, isinstance(self.act_fn, (nn.SiLU, SiLUActivation))
        known = self.silu or isinstance(self.act_fn, GELUTanh)
        alike = len({member.r[ADAPTER] for member in members}) == 1 and all(base.bias is None for base in bases)
        inputs, width = bases[0].in_features, bases[2].in_features
        self.whole = known and alike and inputs <= 2 * width and bases[2].out_features < width
        fits = inputs % MULTIPLE == width % MULTIPLE == 0 and all(base.weight.is_floating_point() for base in bases)
        self.fp8 = how.fp8 and self.whole and fits
        self.expand, self.contract = (LoraGroup(part, self.fp8, how.split) for part in (members[:2], members[2:]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        if self.whole:
            flat = x.flatten(0, -2).to(self.expand.low_a.dtype)
            y = gated_mlp(flat, self.expand, self.contract, self.silu, self.keep)
            return cast(Tensor, y.unflatten(0, x.shape[:-1]))
        gate, up = self.expand(x)
        return cast(Tensor, self.contract(cast(Any, self.act_fn)(gate) * up)[0])


class FusedAttention(nn.Module):
    """Attention as Llama, Qwen and Gemma 3 write it (some with norms of heads); q, k and v as one product."""

    NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
    NORMS = ("q_norm", "k_norm")

    def __init__(self, attention: Any, how: How) -> None:
        super().__init__()
        for name in (*self.NAMES, *(norm for norm in self.NORMS if hasattr(attention, norm))):
            setattr(self, name, getattr(attention, name))
        self.config, self.head_dim, self.scaling = attention.config, attention.head_dim, attention.scaling
        self.dropout, self.is_causal = attention.attention_dropout, attention.is_causal
        self.num_key_value_groups = attention.num_key_value_groups
        self.sliding_window = getattr(attention, "sliding_window", None)
        self.rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.read = LoraGroup([cast(LoraLayer, getattr(self, name)) for name in self.NAMES[:3]], split=how.split)
        self.write = LoraGroup([cast(LoraLayer, self.o_proj)], split=how.split)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, H) -> (B, L, H), and attention weights where the implementation gives them."""
        if past_key_values is not None:
            raise ValueError("a fused model is for training: set use_cache=False")
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part.reshape(shape) for part in self.read(hidden_states))
        if hasattr(self, "q_norm"):
            query, key = cast(Any, self.q_norm)(query), cast(Any, self.k_norm)(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
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
            **others,
        )
        return self.write(out.reshape(*hidden_states.shape[:-1], -1))[0], weights


def fuse_adapters(
    model: PreTrainedModel, keep: bool = True, fp8: bool = False, split: bool = False, dtype: torch.dtype | None = None
) -> list[LoraGroup]:
    """Fuses what can be; the groups made, none for a model without plain LoRA adapters. `keep`, `fp8`, `split`: see
    `How`; with `split` the layers are split over the processes as well, and put together in `dtype` where all weights
    are trained."""
    how = How(keep, fp8, split)
    for parent in list(unwrap(model).modules()):
        for name, child in list(parent.named_children()):
            kind = _kind(child)
            replaced = _replacement(child, kind, how) if kind else None
            if replaced is not None:
                setattr(parent, name, replaced)
    groups = [module for module in unwrap(model).modules() if isinstance(module, LoraGroup)]
    inside = {id(member) for group in groups for member in group.members}
    for module in list(unwrap(model).modules()):
        if id(module) not in inside and _is_plain(module):
            groups.append(_fuse_one(cast(LoraLayer, module), split))
    body = unwrap(model).base_model
    if split:
        multiplied = {id(member.get_base_layer().weight) for group in groups for member in group.members}
        kept = [p for p in body.parameters() if groups and (p.requires_grad or id(p) in multiplied)]
        split_layers(body, layers_of(model), kept, dtype if unwrap(model) is model else None)
    if groups:  # before fsdp2's own hook, which begins to put weights together
        body.register_forward_pre_hook(lambda *_: refresh(groups), prepend=True)
    return groups


def _fuse_one(layer: LoraLayer, split: bool) -> LoraGroup:
    group = LoraGroup([layer], split=split)
    module = cast(Any, layer)
    module.add_module("fused", group)
    module.forward = lambda x: group(x)[0].to(x.dtype)
    return group


def _kind(module: nn.Module) -> Callable[[Any, How], nn.Module] | None:
    """The class that could replace a module, by the names of its children."""
    names = {name for name, _ in module.named_children()}
    if names == set(FusedMLP.NAMES) and _together(module, FusedMLP.NAMES[:2]) and _is_plain(module.down_proj):
        return FusedMLP
    attention = names - set(FusedAttention.NORMS) == set(FusedAttention.NAMES)
    if attention and _together(module, FusedAttention.NAMES[:3]) and _is_plain(module.o_proj):
        return FusedAttention
    return None


def _is_plain(module: Any) -> bool:
    """Whether an adapter is one of the kind that is fused: no dropout, no DoRA, no bias; its base dense or NF4."""
    if not isinstance(module, LoraLayer) or list(module.active_adapters) != [ADAPTER] or module.merged:
        return False
    base = cast(Any, module.get_base_layer())
    plain = not module.lora_variant and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
    dense = type(base) is nn.Linear and not getattr(module, "fan_in_fan_out", False)
    quantized = type(base).__name__ == "Linear4bit" and nf4_parts(base.weight) is not None
    return plain and cast(Any, module).lora_B[ADAPTER].bias is None and (dense or quantized)


def _together(parent: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether children are adapted with one rank on bases of one kind and dtype."""
    children = [cast(Any, getattr(parent, name)) for name in names]
    if not all(_is_plain(child) for child in children):
        return False
    return len({(child.r[ADAPTER], child.get_base_layer().weight.dtype) for child in children}) == 1


@torch.no_grad()
def _replacement(module: Any, kind: Callable[[Any, How], nn.Module], how: How) -> nn.Module | None:
    """Ours, if it computes what the module does on random input; else None, and the module is as it was."""
    weights = {name: parameter.data for name, parameter in module.named_parameters()}
    base = next(module.children()).get_base_layer()
    dtype = base.weight.dtype if base.weight.is_floating_point() else base.weight.quant_state.dtype
    x = torch.randn(1, 8, base.in_features, dtype=dtype, device=base.weight.device)
    inputs: tuple[Any, ...] = (x,)
    if kind is FusedAttention:
        angle = torch.randn(1, 8, module.head_dim // 2, device=x.device).repeat(1, 1, 2)
        inputs = (x, (angle.cos().to(dtype), angle.sin().to(dtype)), None)
    training = module.training
    try:
        want = _first(module.eval()(*inputs))
        replaced = kind(module, how).eval()
        refresh(group for group in replaced.modules() if isinstance(group, LoraGroup))
        got = _first(replaced(*inputs))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        got = torch.full_like(x, torch.nan)
    finally:
        module.train(training)
    near = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    if how.fp8 and kind is FusedMLP:
        near = FP8_NEAR
    if torch.allclose(got, want, rtol=near, atol=near * float(want.abs().max())):
        return replaced.train(training)
    for name, parameter in module.named_parameters():
        parameter.data = weights[name]
    return None


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
