"""Attention over rows that lie one behind the other without padding, registered with transformers as two kinds.

    use_packed_attention(model)                      # once; then hidden_states(model, pack(...)) in
    tasks.engine.models.lm_head

`packed_varlen` is torch's own variable-length flash kernel (CUDA, half precision, head dimension up to 256);
`packed_padded` gathers the rows into a padded view for scaled_dot_product_attention and scatters them back (CPU,
float32, older cards). Both keep every row to itself, know grouped keys and the sliding window, and treat a batch
(B, L) without `cu_seq_lens_q` as B rows of L tokens: right-padded rows need no mask either, since attention is causal.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

# torch 2.11 takes fewer key heads as they are, 2.13 wants to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def use_packed_attention(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Switches the text layers of `model` to the packed attention that fits its device and `dtype`, the dtype of
    queries and keys. Towers keep theirs."""
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
    kind = "packed_varlen" if flash else "packed_padded"
    parts = {name for name in model.config.sub_configs if getattr(model.config, name) is config}
    model.set_attn_implementation(dict.fromkeys(parts, kind) if parts else kind)


def _flash(
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
    **others: Any,
) -> tuple[Tensor, None]:
    """Query (B, H, L, D), key and value (B, G, L, D) -> (B, L, H, D), and no attention weights."""
    _refuse_unknown(module, query, key, attention_mask, others)
    batch, heads, length, width = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * length
    longest = max_length_q or length
    dtype = query.dtype
    if dtype == torch.float32:  # float32 weights under autocast
        dtype = torch.get_autocast_dtype("cuda")
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype).contiguous() for x in (query, key, value))
    window = (sliding_window - 1, 0) if sliding_window and sliding_window < longest else (-1, 0)
    borders = cu_seq_lens_q
    out = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scaling, window_size=window, **_GROUPED)
    return cast(Tensor, out).view(batch, length, heads, width), None


def _padded(
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
    **others: Any,
) -> tuple[Tensor, None]:
    """As `_flash`, through scaled_dot_product_attention on a padded view (rows, H, longest, D)."""
    _refuse_unknown(module, query, key, attention_mask, others)
    batch, heads, length, width = query.shape
    packed = cu_seq_lens_q is not None and max_length_q is not None
    longest = max_length_q if packed and max_length_q else length
    mask, causal = None, True
    if sliding_window and sliding_window < longest:
        at = torch.arange(longest, device=query.device)
        back = at[:, None] - at[None, :]
        mask, causal = (back >= 0) & (back < sliding_window), False
    if packed:
        there, back_again = _places(cast(Tensor, cu_seq_lens_q), longest, length)
        query, key, value = (_gather(x, there) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and mask is not None:  # a mask with enable_gqa would take the slow reference kernel
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=groups > 1
    ).transpose(1, 2)
    if packed:
        out = out.flatten(0, 1).index_select(0, back_again).unsqueeze(0)
    return out.contiguous(), None


def _places(cu_seqlens: Tensor, longest: int, length: int) -> tuple[Tensor, Tensor]:
    """Where the padded view (rows, longest) finds its tokens among `length`, and where these find theirs in it."""
    at = torch.arange(length, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens, at, right=True, out_int32=True) - 1
    back_again = row * longest + at - cu_seqlens[row]
    there = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    return there.clamp_(max=length - 1), back_again


def _gather(x: Tensor, there: Tensor) -> Tensor:
    """(1, H, L, D) -> (rows, H, longest, D); places behind a row's end hold its neighbour's tokens, never read."""
    rows = x[0].transpose(0, 1).index_select(0, there.flatten())
    return rows.view(*there.shape, *rows.shape[1:]).transpose(1, 2)


def _refuse_unknown(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, others: dict[str, Any]) -> None:
    """Raises ValueError for what these kernels would silently leave out."""
    if mask is not None:
        raise ValueError("packed attention takes no mask: give whole rows, padded on the right")
    if query.shape[2] != key.shape[2]:
        raise ValueError("packed attention has no cache of earlier keys: set use_cache=False, or another attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"packed attention does not know {name} ({type(module).__name__})")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError(f"packed attention is causal, {type(module).__name__} is not")


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    return attention_mask  # only for _refuse_unknown to see


_kinds: dict[str, Callable[..., tuple[Tensor, None]]] = {"packed_varlen": _flash, "packed_padded": _padded}
for _name, _function in _kinds.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, cast(Any, _no_mask))
