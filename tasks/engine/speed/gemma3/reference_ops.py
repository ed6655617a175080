"""What a layer does between its products, forward and backward, in plain torch: the reference, and the CPU's path.

Shapes: T tokens, H hidden, D head dimension, A heads, G heads of keys and values. Weights are Gemma's: the gain of a
norm is 1 + weight. Arithmetic is in float32 or above. Names and arguments are those of
tasks.engine.speed.gemma3.kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.speed.gemma3.attention_shapes import Attention, Rows

PROGRAMS = HEAD_PROGRAMS = 1


def wide(x: Tensor) -> Tensor:
    """Float32; float64 stays so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x normed with its gain, without it, and 1 / its root mean square."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    bare = x * inverse
    return bare * (1 + weight), bare, inverse


def _norm_backward(grad: Tensor, bare: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a norm's input and of its weight, the latter's summed over all but the last axis."""
    slope = grad * (1 + weight)
    back = inverse * (slope - bare * (slope * bare).mean(-1, keepdim=True))
    return back, (grad * bare).flatten(0, -2).sum(0)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The first layer's normed input (T, H)."""
    return _norm(wide(x), weight, eps)[0].to(x.dtype)


def add_norm(x: Tensor, added: Tensor, gain: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream x + norm(added; gain), and norm of that by `weight`: both (T, H)."""
    summed = wide(x) + _norm(wide(added), gain, eps)[0]
    summed = summed.to(x.dtype)
    return summed, _norm(wide(summed), weight, eps)[0].to(x.dtype)


def add_norm_backward(
    dx: Tensor | None, dn: Tensor, x: Tensor, added: Tensor | None, gain: Tensor | None, weight: Tensor, eps: float,
    shares: Tensor, again: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """From the gradients of add_norm's two results (`dx` None: 0): the residual stream's gradient, that of `added`,
    and the second result once more. x is the first result, or with `again` what it was made from. `shares`
    (2, PROGRAMS, H) takes the gradients of `weight` and `gain`, to be summed over its programs.

    Without `added` it is the backward of `norm`.
    """
    if again and added is not None and gain is not None:
        x = add_norm(x, added, gain, weight, eps)[0]
    normed, bare, inverse = _norm(wide(x), weight, eps)
    back, of_weight = _norm_backward(wide(dn), bare, inverse, weight)
    back = back if dx is None else wide(dx) + back
    total = back.to(x.dtype)
    shares[0, 0] = of_weight
    dadded = None
    if added is not None and gain is not None:
        _, bare, inverse = _norm(wide(added), gain, eps)
        before, of_gain = _norm_backward(wide(total), bare, inverse, gain)
        dadded = before.to(x.dtype)
        shares[1, 0] = of_gain
    return total, dadded, normed.to(x.dtype)


def rotate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: Rows, kind: Attention) -> tuple[Tensor, Tensor]:
    """Queries (T, A, D) and keys (T, G, D), normed a head and turned by their positions, from (T, (A + 2G) D)."""
    heads = wide(qkv).view(len(qkv), -1, kind.head_dim)
    found = []
    for some, weight in zip(
        heads.split([kind.heads, kind.kv_heads, kind.kv_heads], 1), (q_weight, k_weight), strict=False
    ):
        y = _norm(some, weight, kind.eps)[0]
        found.append(_turned(y, rows, kind, 1).to(qkv.dtype))
    return found[0], found[1]


def _turned(y: Tensor, rows: Rows, kind: Attention, sign: int) -> Tensor:
    """y (T, A, D) turned by its positions' angles, or back."""
    cos, sin = (table[rows.positions][:, None].to(y.dtype) for table in rows.tables[kind.local])
    low, high = y.chunk(2, -1)
    return torch.cat([low * cos - sign * high * sin, high * cos + sign * low * sin], -1)


def rotate_backward(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rows: Rows, kind: Attention,
    shares: Tensor,
) -> None:  # fmt: skip
    """Turns queries and keys in `qkv` into their gradient, in place. `shares` (A + G, HEAD_PROGRAMS, D) takes the
    weights' gradients, to be summed over heads and programs."""
    heads, first = qkv.view(len(qkv), -1, kind.head_dim), 0
    queries, keys, _ = heads.split([kind.heads, kind.kv_heads, kind.kv_heads], 1)
    for some, grad, weight in ((queries, dq, q_weight), (keys, dk, k_weight)):
        _, bare, inverse = _norm(wide(some), weight, kind.eps)
        turned = _turned(wide(grad), rows, kind, -1)
        shares[first : first + some.shape[1], 0] = (turned * bare).sum(0)
        some.copy_(_norm_backward(turned, bare, inverse, weight)[0])
        first += some.shape[1]


def gated(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up (T, F) of (T, 2F)."""
    gate, up = wide(gate_up).chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def gated_backward(gate_up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, in its place, and gelu(gate) * up, in the place of `dh`."""
    gate, up = wide(gate_up).chunk(2, -1)
    grad = wide(dh)
    act = F.gelu(gate, approximate="tanh")
    slope, out = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"), act * up
    gate_up.copy_(torch.cat([slope, grad * act], -1))
    return gate_up, dh.copy_(out)


def _visible(rows: Rows, kind: Attention) -> Tensor:
    """Which keys (T) a query (T) sees: (T, T)."""
    at = torch.arange(len(rows.positions), device=rows.positions.device)
    row = torch.searchsorted(rows.cu_seqlens, at, right=True)
    back = at[:, None] - at[None, :]
    seen = (back >= 0) & (row[:, None] == row[None, :])
    return seen & (back < kind.window) if kind.window else seen


def _probs(q: Tensor, k: Tensor, rows: Rows, kind: Attention) -> Tensor:
    """Attention's weights (A, T, T)."""
    keys = wide(k).repeat_interleave(kind.heads // kind.kv_heads, 1)
    scores = torch.einsum("iad,jad->aij", wide(q), keys) * kind.scale
    return scores.masked_fill(~_visible(rows, kind), -torch.inf).softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, kind: Attention) -> tuple[Tensor, Tensor]:
    """Attention's output (T, A D), and what its backward wants to know besides."""
    probs = _probs(q, k, rows, kind)
    values = wide(v).repeat_interleave(kind.heads // kind.kv_heads, 1)
    return torch.einsum("aij,jad->iad", probs, values).flatten(1).to(q.dtype), q.new_empty(0)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, known: Tensor, rows: Rows, kind: Attention
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys; the values' takes the place of `v`."""
    groups = kind.heads // kind.kv_heads
    probs, grad = _probs(q, k, rows, kind), wide(do).view(q.shape)
    values = wide(v).repeat_interleave(groups, 1)
    ds = torch.einsum("iad,jad->aij", grad, values)
    ds = probs * (ds - (ds * probs).sum(-1, keepdim=True)) * kind.scale
    dq = torch.einsum("aij,jad->iad", ds, wide(k).repeat_interleave(groups, 1))
    dk = torch.einsum("aij,iad->jad", ds, wide(q)).unflatten(1, (kind.kv_heads, groups)).sum(2)
    v.copy_(torch.einsum("aij,iad->jad", probs, grad).unflatten(1, (kind.kv_heads, groups)).sum(2))
    return dq.to(q.dtype), dk.to(q.dtype)
