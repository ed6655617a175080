"""A layer's operations between its matrix products, forward and backward, in plain torch: the kernels' reference.

Also the CPU's path. Names and arguments are those of tasks.engine.speed.gemma3.kernels. Arithmetic is in float32 or
above. A norm's gain is 1 + weight, as in Gemma.

Shapes: T tokens, H hidden, F ffn, D head dimension, A heads, G key/value heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.speed.gemma3.attention_shapes import AttentionShape, PackedRows

PROGRAMS = HEAD_PROGRAMS = 1


def upcast(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm y = x r (1 + weight) with r = 1 / sqrt(mean(x^2) + eps); returns y, x r and r."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normalized = x * inverse
    return normalized * (1 + weight), normalized, inverse


def _norm_backward(grad: Tensor, normalized: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of an RMS norm's input and weight, with n = x r and g = grad (1 + weight).

    d_x = r (g - n mean(g n)), d_weight = sum(grad n) over all axes but the last.
    """
    scaled = grad * (1 + weight)
    d_x = inverse * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True))
    return d_x, (grad * normalized).flatten(0, -2).sum(0)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm (T, H) of x (T, H)."""
    return _norm(upcast(x), weight, eps)[0].to(x.dtype)


def add_norm(x: Tensor, added: Tensor, gain: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual stream s = x + norm(added; gain), and norm(s; weight): both (T, H)."""
    summed = upcast(x) + _norm(upcast(added), gain, eps)[0]
    summed = summed.to(x.dtype)
    return summed, _norm(upcast(summed), weight, eps)[0].to(x.dtype)


def add_norm_backward(
    d_x: Tensor | None, d_normed: Tensor, x: Tensor, added: Tensor | None, gain: Tensor | None, weight: Tensor,
    eps: float, partials: Tensor, recompute_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Backward of `add_norm`, or without `added` of `norm`: gradients of x and of `added`, and norm(s; weight) again.

    `d_x` (None: 0) and `d_normed` are the gradients of add_norm's two results. `x` is s, or with `recompute_sum` the x
    that s is computed from. `partials` (2, PROGRAMS, H) gets the gradients of `weight` and `gain`, to be summed over
    programs.
    """
    if recompute_sum and added is not None and gain is not None:
        x = add_norm(x, added, gain, weight, eps)[0]
    normed, normalized, inverse = _norm(upcast(x), weight, eps)
    d_sum, d_weight = _norm_backward(upcast(d_normed), normalized, inverse, weight)
    d_sum = d_sum if d_x is None else upcast(d_x) + d_sum
    d_residual = d_sum.to(x.dtype)
    partials[0, 0] = d_weight
    d_added = None
    if added is not None and gain is not None:
        _, normalized, inverse = _norm(upcast(added), gain, eps)
        d_input, d_gain = _norm_backward(upcast(d_residual), normalized, inverse, gain)
        d_added = d_input.to(x.dtype)
        partials[1, 0] = d_gain
    return d_residual, d_added, normed.to(x.dtype)


def norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: PackedRows, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """Queries (T, A, D) and keys (T, G, D) of qkv (T, (A + 2G) D), RMS-normed per head and with rotary positions."""
    heads = upcast(qkv).view(len(qkv), -1, shape.head_dim)
    rotated = []
    for part, weight in zip(
        heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1), (q_weight, k_weight), strict=False
    ):
        normalized = _norm(part, weight, shape.eps)[0]
        rotated.append(_rotate(normalized, rows, shape, 1).to(qkv.dtype))
    return rotated[0], rotated[1]


def _rotate(heads: Tensor, rows: PackedRows, shape: AttentionShape, sign: int) -> Tensor:
    """Rotates heads (T, A, D) by their positions' angles, with `sign` -1 back.

    [l cos - h sin, h cos + l sin] of a head's halves [l, h].
    """
    cos, sin = (table[rows.positions][:, None].to(heads.dtype) for table in rows.rope_tables[shape.is_local])
    low, high = heads.chunk(2, -1)
    return torch.cat([low * cos - sign * high * sin, high * cos + sign * low * sin], -1)


def norm_rotate_backward(
    d_q: Tensor, d_k: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: PackedRows, shape: AttentionShape,
    partials: Tensor,
) -> None:  # fmt: skip
    """Replaces queries and keys in `qkv` by their gradients.

    `partials` (A + G, HEAD_PROGRAMS, D) gets the norm weights' gradients, to be summed over heads and programs.
    """
    heads, head = qkv.view(len(qkv), -1, shape.head_dim), 0
    queries, keys, _ = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    for part, grad, weight in ((queries, d_q, q_weight), (keys, d_k, k_weight)):
        _, normalized, inverse = _norm(upcast(part), weight, shape.eps)
        d_normed = _rotate(upcast(grad), rows, shape, -1)
        partials[head : head + part.shape[1], 0] = (d_normed * normalized).sum(0)
        part.copy_(_norm_backward(d_normed, normalized, inverse, weight)[0])
        head += part.shape[1]


def gated_gelu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up (T, F) of [gate | up] (T, 2F)."""
    gate, up = upcast(gate_up).chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def gated_gelu_backward(gate_up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [d_hidden up gelu'(gate) | d_hidden gelu(gate)] into `gate_up`, and gelu(gate) * up into `d_hidden`."""
    gate, up = upcast(gate_up).chunk(2, -1)
    grad = upcast(d_hidden)
    act = F.gelu(gate, approximate="tanh")
    d_gate, hidden = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), act * up
    gate_up.copy_(torch.cat([d_gate, grad * act], -1))
    return gate_up, d_hidden.copy_(hidden)


def _visible(rows: PackedRows, shape: AttentionShape) -> Tensor:
    """Mask (T, T) of the keys that each query attends to: earlier ones of its row, within the window."""
    position = torch.arange(len(rows.positions), device=rows.positions.device)
    row = torch.searchsorted(rows.cu_seqlens, position, right=True)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (row[:, None] == row[None, :])
    return visible & (distance < shape.window) if shape.window else visible


def _probs(q: Tensor, k: Tensor, rows: PackedRows, shape: AttentionShape) -> Tensor:
    """Attention probabilities softmax(scale q k') (A, T, T)."""
    keys = upcast(k).repeat_interleave(shape.heads // shape.kv_heads, 1)
    scores = torch.einsum("iad,jad->aij", upcast(q), keys) * shape.scale
    return scores.masked_fill(~_visible(rows, shape), -torch.inf).softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Attention's output (T, A D), and a tensor that its backward needs (empty here, log-sum-exps of the kernels)."""
    probs = _probs(q, k, rows, shape)
    values = upcast(v).repeat_interleave(shape.heads // shape.kv_heads, 1)
    return torch.einsum("aij,jad->iad", probs, values).flatten(1).to(q.dtype), q.new_empty(0)


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: PackedRows, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys; that of the values is written into `v`.

    With P the probabilities and dP = dO V': dS = P (dP - sum(dP P)) scale, dQ = dS K, dK = dS' Q, dV = P' dO.
    """
    groups = shape.heads // shape.kv_heads
    probs, d_heads = _probs(q, k, rows, shape), upcast(d_out).view(q.shape)
    values = upcast(v).repeat_interleave(groups, 1)
    d_scores = torch.einsum("iad,jad->aij", d_heads, values)
    d_scores = probs * (d_scores - (d_scores * probs).sum(-1, keepdim=True)) * shape.scale
    d_q = torch.einsum("aij,jad->iad", d_scores, upcast(k).repeat_interleave(groups, 1))
    d_k = torch.einsum("aij,iad->jad", d_scores, upcast(q)).unflatten(1, (shape.kv_heads, groups)).sum(2)
    v.copy_(torch.einsum("aij,iad->jad", probs, d_heads).unflatten(1, (shape.kv_heads, groups)).sum(2))
    return d_q.to(q.dtype), d_k.to(q.dtype)
