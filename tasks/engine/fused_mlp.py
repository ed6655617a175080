"""down(act(gate(x)) * up(x)) with its adapters as one operation, forward and backward, some thousand tokens at a time.

The wide middle (M tokens x 2F) is the largest thing of a layer's training. Here it lives for `CHUNK` tokens only: the
backward makes it again from x, and one kernel turns it into its own gradient in place. With `keep` it is kept from
the forward instead: faster, and 2F values a token and layer. The products are those of tasks.engine.fused_lora.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.fused_lora import LoraGroup, add_product, alone, extended_weight

CHUNK = 4096


def gated_mlp(x: Tensor, expand: LoraGroup, contract: LoraGroup, silu: bool, keep: bool) -> Tensor:
    """(M, N) of x (M, K): `expand` has gate and up, `contract` down; the activation is silu, or gelu by tanh."""
    (a, b), (a_out, b_out) = expand.adapters(), contract.adapters()
    into = (expand.extended, expand.quantized_parts(), expand.low_a, expand.low_b)
    out = (contract.extended, contract.quantized_parts(), contract.low_a, contract.low_b)
    scales = [*expand.scales, *contract.scales]
    return cast(Tensor, _mlp(x, *into, *out, [*a, *a_out], [*b, *b_out], scales, silu, keep)[0])


def _chunks(tokens: int) -> list[slice]:
    step = -(-tokens // max(1, -(-tokens // CHUNK)))
    step = -(-step // 128) * 128
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


@torch.library.custom_op("stillhouse::gated_mlp", mutates_args=())
def _mlp(
    x: Tensor,
    extended: Tensor,
    quantized: list[Tensor],
    low_a: Tensor,
    low_b: Tensor,
    extended_out: Tensor,
    quantized_out: list[Tensor],
    low_a_out: Tensor,
    low_b_out: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (M, N), x A' (M, 2r), h A' (M, r), and the middle (M, 2F) or nothing of it."""
    width, outputs, rank = low_a_out.shape[1], low_b_out.shape[0], low_b_out.shape[1]
    weight = extended_weight(extended, quantized, low_a, low_b, [width, width])
    weight_out = extended_weight(extended_out, quantized_out, low_a_out, low_b_out, [outputs])
    both = x.new_empty((len(x), outputs + rank))
    xa = torch.mm(x, low_a.T)
    middle = x.new_empty((len(x) if keep else 0, 2 * width))
    for rows in _chunks(len(x)):
        gate_up = torch.mm(torch.cat([x[rows], xa[rows]], 1), weight.T, out=middle[rows] if keep else None)
        torch.mm(_gated(gate_up, silu), weight_out.T, out=both[rows])
        del gate_up
    ha = both[:, outputs:].contiguous()
    return alone(both[:, :outputs].addmm_(ha, low_b_out.T)), xa, ha, middle


@_mlp.register_fake
def _shapes(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
    low_a, low_a_out, low_b_out, keep = weights[2], weights[6], weights[7], weights[-1]
    tokens, width = x.shape[0], low_a_out.shape[1]
    xa, ha = x.new_empty((tokens, low_a.shape[0])), x.new_empty((tokens, low_a_out.shape[0]))
    outputs, rank = low_b_out.shape
    y = x.new_empty((tokens, outputs + rank))[:, :outputs]
    return y, xa, ha, x.new_empty((tokens if keep else 0, 2 * width))


@torch.library.custom_op("stillhouse::gated_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    ha: Tensor,
    middle: Tensor,
    extended: Tensor,
    quantized: list[Tensor],
    low_a: Tensor,
    low_b: Tensor,
    extended_out: Tensor,
    quantized_out: list[Tensor],
    low_a_out: Tensor,
    low_b_out: Tensor,
    scales: list[float],
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and in float32 of the stacked A and B of gate and up, and of down's A and B."""
    width, outputs, rank, inputs = low_a_out.shape[1], low_b_out.shape[0], low_b_out.shape[1], x.shape[1]
    weight = extended_weight(extended, quantized, low_a, low_b, [width, width])
    weight_out = extended_weight(extended_out, quantized_out, low_a_out, low_b_out, [outputs])
    exact = torch.promote_types(x.dtype, torch.float32)
    da, db, da_out, db_out = (torch.zeros_like(low, dtype=exact) for low in (low_a, low_b, low_a_out, low_b_out))
    kept, dha = len(middle) > 0, torch.mm(grad, low_b_out)
    add_product(db_out, grad.T, ha, scales[2])
    both, grad = x.new_empty((len(x), inputs + len(low_a))), torch.cat([grad, dha], 1)
    for rows in _chunks(len(x)):
        gate_up = middle[rows] if kept else torch.mm(torch.cat([x[rows], xa[rows]], 1), weight.T)
        dgate_up, h = gate_backward(gate_up, torch.mm(grad[rows], weight_out), silu, in_place=not kept)
        add_product(da_out, dha[rows].T, h)
        torch.mm(dgate_up, weight, out=both[rows])
        for i in range(2):
            side, low = slice(i * width, (i + 1) * width), slice(i * rank, (i + 1) * rank)
            add_product(db[side], dgate_up[:, side].T, xa[rows, low], scales[i])
        del gate_up, dgate_up, h  # or the next rows' would be made beside them
    dx, dxa = both[:, :inputs], both[:, inputs:]
    dx.addmm_(dxa, low_a)
    add_product(da, dxa.T, x)
    return alone(dx), da, db, da_out, db_out


@_backward.register_fake
def _gradient_shapes(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    lows = [others[i] for i in (5, 6, 9, 10)]
    exact = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty((x.shape[0], x.shape[1] + lows[0].shape[0]))[:, : x.shape[1]]
    return dx, *(torch.empty_like(low, dtype=exact) for low in lows)


def _gated(gate_up: Tensor, silu: bool) -> Tensor:
    """act(gate) * up (M, F) of (M, 2F)."""
    if gate_up.is_cuda:
        from tasks.engine.fused_mlp_kernel import forward  # noqa: PLC0415  # Triton is where CUDA is

        return forward(gate_up, silu)
    gate, up = gate_up.chunk(2, 1)
    return (F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up


def gate_backward(gate_up: Tensor, dh: Tensor, silu: bool, in_place: bool) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, h), in the places of `gate_up` and `dh` with `in_place`; `dh` is lost either way."""
    if gate_up.is_cuda:
        from tasks.engine.fused_mlp_kernel import backward  # noqa: PLC0415

        return backward(gate_up, dh, silu, in_place)
    gate, up = gate_up.chunk(2, 1)
    act = F.silu(gate) if silu else F.gelu(gate, approximate="tanh")
    slope = dh * up
    if silu:
        slope = torch.ops.aten.silu_backward(slope, gate)
    else:
        slope = torch.ops.aten.gelu_backward(slope, gate, approximate="tanh")
    return torch.cat([slope, dh * act], 1), act * up


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, extended, quantized, low_a, low_b, extended_out, quantized_out, low_a_out, low_b_out, a, b = inputs[:11]
    ctx.scales, ctx.silu = inputs[11:13]
    ctx.save_for_backward(
        x, *output[1:], extended, low_a, low_b, extended_out, low_a_out, low_b_out, *quantized, *quantized_out
    )
    ctx.parts, ctx.dtype, ctx.ranks, ctx.sizes = len(quantized), a[0].dtype, [len(p) for p in a], [len(p) for p in b]
    ctx.parts_out = len(quantized_out)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, xa, ha, middle, extended, low_a, low_b, extended_out, low_a_out, low_b_out, *quantized = ctx.saved_tensors
    into, out = [None] * ctx.parts, [None] * ctx.parts_out
    frozen: tuple[Any, ...] = (None, into, None, None, None, out, None, None)
    if grad is None:
        return None, *frozen, [None] * 3, [None] * 3, None, None, None
    dx, da, db, da_out, db_out = _backward(
        grad.contiguous(), x, xa, ha, middle, extended, quantized[: ctx.parts], low_a, low_b, extended_out,
        quantized[ctx.parts :], low_a_out, low_b_out, ctx.scales, ctx.silu,
    )  # fmt: skip
    das = [*da.to(ctx.dtype).split_with_sizes(ctx.ranks[:2]), da_out.to(ctx.dtype)]
    dbs = [*db.to(ctx.dtype).split_with_sizes(ctx.sizes[:2]), db_out.to(ctx.dtype)]
    return dx, *frozen, das, dbs, None, None, None


_mlp.register_autograd(_gradients, setup_context=_keep)
