"""Causal attention within each row of a packed sequence, as two attention implementations of transformers.

    use_packed_attention(model, dtype)

`packed_varlen` is torch's variable-length flash kernel (CUDA, half precision, head dimension up to 256);
`packed_padded` gathers the rows into a padded view for scaled_dot_product_attention and scatters its output back (CPU,
float32, older GPUs). Both support grouped-query attention and sliding windows, and take a batch (B, L) without
`cu_seq_lens_q` as B rows of L tokens: right-padded rows need no mask either, since attention is causal.

Shapes: B batch, L tokens of the packed sequence, H heads, G key/value heads, D head dimension.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

# torch 2.11 infers grouped-query attention from the shapes, 2.13 needs the flag.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def use_packed_attention(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Sets the packed attention that suits the device and `dtype` of queries and keys on `model`'s text layers.

    Vision and audio towers keep their own.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    flash = (
        model.device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= 256
        and head_dim % 8 == 0
        and not getattr(config, "attention_dropout", 0)
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
    )
    implementation = "packed_varlen" if flash else "packed_padded"
    text_configs = {name for name in model.config.sub_configs if getattr(model.config, name) is config}
    model.set_attn_implementation(dict.fromkeys(text_configs, implementation) if text_configs else implementation)


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query (B, H, L, D), key and value (B, G, L, D) -> (B, L, H, D), and no attention weights."""
    _check_supported(module, query, key, attention_mask, kwargs)
    batch, heads, length, head_dim = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * length
    longest = max_length_q or length
    dtype = query.dtype
    if dtype == torch.float32:  # float32 weights under autocast
        dtype = torch.get_autocast_dtype("cuda")
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype).contiguous() for x in (query, key, value))
    window = (sliding_window - 1, 0) if sliding_window and sliding_window < longest else (-1, 0)
    cu_seqlens = cu_seq_lens_q
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, window_size=window, **_GROUPED)
    return cast(Tensor, out).view(batch, length, heads, head_dim), None


def _padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `_flash`, through scaled_dot_product_attention on a padded view (rows, H, longest, D)."""
    _check_supported(module, query, key, attention_mask, kwargs)
    batch, heads, length, head_dim = query.shape
    packed = cu_seq_lens_q is not None and max_length_q is not None
    longest = max_length_q if packed and max_length_q else length
    mask, causal = None, True
    if sliding_window and sliding_window < longest:
        position = torch.arange(longest, device=query.device)
        distance = position[:, None] - position[None, :]
        mask, causal = (distance >= 0) & (distance < sliding_window), False
    if packed:
        gather_indices, scatter_indices = _padding_indices(cast(Tensor, cu_seq_lens_q), longest, length)
        query, key, value = (_gather_rows(x, gather_indices) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None:  # a mask with enable_gqa would take the slow reference kernel
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=groups > 1
    ).transpose(1, 2)
    if packed:
        out = out.flatten(0, 1).index_select(0, scatter_indices).unsqueeze(0)
    return out.contiguous(), None


def _padding_indices(cu_seqlens: Tensor, longest: int, length: int) -> tuple[Tensor, Tensor]:
    """Indices (rows, longest) of packed tokens for the padded view, and (L,) of the view for the packed tokens."""
    position = torch.arange(length, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens, position, right=True, out_int32=True) - 1
    scatter_indices = row * longest + position - cu_seqlens[row]
    gather_indices = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return gather_indices.clamp_(max=length - 1), scatter_indices


def _gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """(1, H, L, D) -> (rows, H, longest, D); behind a row's end come its neighbour's tokens, which are never read."""
    rows = x[0].transpose(0, 1).index_select(0, indices.flatten())
    return rows.view(*indices.shape, *rows.shape[1:]).transpose(1, 2)


def _check_supported(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises ValueError for arguments that these kernels would ignore."""
    if mask is not None:
        raise ValueError("packed attention takes no mask: pad rows on the right")
    if query.shape[2] != key.shape[2]:
        raise ValueError("packed attention has no key/value cache: set use_cache=False, or another attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"packed attention does not support {name} ({type(module).__name__})")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention is causal, {type(module).__name__} is not")


def _pass_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    return attention_mask  # only for _refuse_unknown to see


_implementations: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "packed_varlen": _varlen_attention,
    "packed_padded": _padded_attention,
}
for _name, _function in _implementations.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, cast(Any, _pass_mask))
