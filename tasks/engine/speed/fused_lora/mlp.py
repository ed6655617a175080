"""down(act(gate(x)) * up(x)) with its adapters as one operation, forward and backward.

The wide middle (M tokens x 2F) is the largest thing of a layer's training. With `keep` it is kept from the forward for
the backward: faster, and 2F values a token and layer; otherwise the backward makes it again from x. The products are
tasks.engine.speed.fused_lora.mlp_dense's, or with frozen weights in 8 bits tasks.engine.speed.fp8.mlp_fp8's.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.speed.fp8 import mlp_fp8
from tasks.engine.speed.fused_lora import mlp_dense
from tasks.engine.speed.fused_lora.group import LoraGroup
from tasks.engine.speed.fused_lora.linear import room
from tasks.engine.speed.fused_lora.mlp_dense import Lows


def gated_mlp(x: Tensor, expand: LoraGroup, contract: LoraGroup, silu: bool, keep: bool) -> Tensor:
    """(M, N) of x (M, K): `expand` has gate and up, `contract` down; the activation is silu, or gelu by tanh."""
    (a, b), (a_out, b_out) = expand.adapters(), contract.adapters()
    lows = [expand.low_a, expand.low_b, contract.low_a, contract.low_b]
    scales = [*expand.scales, *contract.scales]
    weights, fp8 = (expand.weights(), contract.weights()), expand.fp8
    return cast(Tensor, _mlp(x, *weights, lows, [*a, *a_out], [*b, *b_out], scales, silu, keep, fp8)[0])


@torch.library.custom_op("stillhouse::gated_mlp", mutates_args=())
def _mlp(
    x: Tensor, weights: list[Tensor], weights_out: list[Tensor], lows: list[Tensor], a: list[Tensor], b: list[Tensor],
    scales: list[float], silu: bool, keep: bool, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (M, N), x A' (M, 2r), h A' (M, r), and the middle (M, 2F) or nothing of it. `a` and `b` only receive the
    gradient: `lows` are multiplied."""
    forward = mlp_fp8.forward if fp8 else mlp_dense.forward
    return forward(x, weights, weights_out, Lows(*lows), silu, keep)


@_mlp.register_fake
def _shapes(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, weights_out, lows, *_, keep, fp8 = others
    low_a, low_b, low_a_out, low_b_out = lows
    (outputs, rank), tokens = low_b_out.shape, x.shape[0]
    y = room(x, weights_out[2].shape[0] if fp8 else outputs + rank)[:, :outputs]
    xa, ha = x.new_empty((tokens, low_a.shape[0])), x.new_empty((tokens, low_a_out.shape[0]))
    return y, xa, ha, x.new_empty((tokens if keep else 0, low_b.shape[0]))


@torch.library.custom_op("stillhouse::gated_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor, kept: list[Tensor], weights: list[Tensor], weights_out: list[Tensor], lows: list[Tensor],
    scales: list[float], silu: bool, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and in float32 of the stacked A and B of gate and up, and of down's A and B. `kept` are x, x A',
    h A' and the middle."""
    backward = mlp_fp8.backward if fp8 else mlp_dense.backward
    exact = torch.promote_types(grad.dtype, torch.float32)
    sums = Lows(*(torch.zeros_like(low, dtype=exact) for low in lows))
    return backward(grad, kept, weights, weights_out, Lows(*lows), sums, scales, silu), *sums


@_backward.register_fake
def _gradient_shapes(grad: Tensor, kept: list[Tensor], weights: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    x, lows, fp8 = kept[0], others[1], others[-1]
    wide = weights[2].shape[0] if fp8 else x.shape[1] + lows[0].shape[0]
    exact = torch.promote_types(grad.dtype, torch.float32)
    dx = room(x, wide)[:, : x.shape[1]]
    return dx, *(torch.empty_like(low, dtype=exact) for low in lows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, weights_out, lows, a, b, ctx.scales, ctx.silu, _, ctx.fp8 = inputs
    ctx.save_for_backward(x, *output[1:], *lows, *weights, *weights_out)
    ctx.parts, ctx.parts_out = len(weights), len(weights_out)
    ctx.dtype, ctx.ranks, ctx.sizes = a[0].dtype, [len(p) for p in a], [len(p) for p in b]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)  # asked for once: recompute gives them once
    kept, lows, parts = saved[:4], saved[4:8], saved[8:]
    frozen = ([None] * ctx.parts, [None] * ctx.parts_out, [None] * 4)
    if grad is None:
        return None, *frozen, [None] * 3, [None] * 3, None, None, None, None
    dx, da, db, da_out, db_out = _backward(
        grad.contiguous(), kept, parts[: ctx.parts], parts[ctx.parts :], lows, ctx.scales, ctx.silu, ctx.fp8
    )
    das = [*da.to(ctx.dtype).split_with_sizes(ctx.ranks[:2]), da_out.to(ctx.dtype)]
    dbs = [*db.to(ctx.dtype).split_with_sizes(ctx.sizes[:2]), db_out.to(ctx.dtype)]
    return dx, *frozen, das, dbs, None, None, None, None


_mlp.register_autograd(_gradients, setup_context=_keep)
