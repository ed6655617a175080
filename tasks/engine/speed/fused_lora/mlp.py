"""Gated MLP with LoRA as one custom operator, forward and backward.

    [gate | up] = x [W_gate ; W_up]' + ...LoRA          h = act(gate) * up          y = h W_down' + ...LoRA

gate_up (T, 2F) is a layer's largest activation. `save_gate_up` saves it for the backward, which is faster and costs 2F
values per token and layer; otherwise the backward recomputes it from x. The products are
tasks.engine.speed.fused_lora.mlp_dense's, or with frozen weights in 8 bits tasks.engine.speed.fp8.mlp_fp8's.

Shapes: T tokens, K inputs, N outputs, F ffn, r rank; xa = x A' (T, 2r) of gate and up, ha = h A' (T, r) of down. `_out`
marks down's tensors.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.speed.fp8 import mlp_fp8
from tasks.engine.speed.fused_lora import mlp_dense
from tasks.engine.speed.fused_lora.group import LoraGroup
from tasks.engine.speed.fused_lora.linear import empty_aligned
from tasks.engine.speed.fused_lora.mlp_dense import LoraMatrices


def gated_mlp(x: Tensor, gate_up: LoraGroup, down: LoraGroup, silu: bool, save_gate_up: bool) -> Tensor:
    """x (T, K) -> (T, N) through the groups of gate and up, and of down; the activation is SiLU, or GELU by tanh."""
    (a, b), (a_out, b_out) = gate_up.adapters(), down.adapters()
    lora = [gate_up.lora_a, gate_up.lora_b, down.lora_a, down.lora_b]
    scales = [*gate_up.scales, *down.scales]
    weights, fp8 = (gate_up.weights(), down.weights()), gate_up.fp8
    return cast(Tensor, _mlp(x, *weights, lora, [*a, *a_out], [*b, *b_out], scales, silu, save_gate_up, fp8)[0])


@torch.library.custom_op("stillhouse::gated_mlp", mutates_args=())
def _mlp(
    x: Tensor, weights: list[Tensor], weights_out: list[Tensor], lora: list[Tensor], a: list[Tensor], b: list[Tensor],
    scales: list[float], silu: bool, save_gate_up: bool, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, N), xa (T, 2r), ha (T, r), and gate_up (T, 2F), empty unless saved.

    `a` and `b` (peft's parameters) only receive gradients; `lora` are the matrices that are multiplied.
    """
    forward = mlp_fp8.forward if fp8 else mlp_dense.forward
    return forward(x, weights, weights_out, LoraMatrices(*lora), silu, save_gate_up)


@_mlp.register_fake
def _shapes(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, weights_out, lora, *_, save_gate_up, fp8 = arguments
    lora_a, lora_b, lora_a_out, lora_b_out = lora
    (outputs, rank), tokens = lora_b_out.shape, x.shape[0]
    y = empty_aligned(x, weights_out[2].shape[0] if fp8 else outputs + rank)[:, :outputs]
    xa, ha = x.new_empty((tokens, lora_a.shape[0])), x.new_empty((tokens, lora_a_out.shape[0]))
    return y, xa, ha, x.new_empty((tokens if save_gate_up else 0, lora_b.shape[0]))


@torch.library.custom_op("stillhouse::gated_mlp_backward", mutates_args=())
def _backward(
    dy: Tensor, saved: list[Tensor], weights: list[Tensor], weights_out: list[Tensor], lora: list[Tensor],
    scales: list[float], silu: bool, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and in float32 of A and B of gate and up (stacked) and of down; `saved`: x, xa, ha, gate_up."""
    backward = mlp_fp8.backward if fp8 else mlp_dense.backward
    dtype = torch.promote_types(dy.dtype, torch.float32)
    lora_grads = LoraMatrices(*(torch.zeros_like(matrix, dtype=dtype) for matrix in lora))
    return backward(dy, saved, weights, weights_out, LoraMatrices(*lora), lora_grads, scales, silu), *lora_grads


@_backward.register_fake
def _gradient_shapes(dy: Tensor, saved: list[Tensor], weights: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    x, lora, fp8 = saved[0], arguments[1], arguments[-1]
    columns = weights[2].shape[0] if fp8 else x.shape[1] + lora[0].shape[0]
    dtype = torch.promote_types(dy.dtype, torch.float32)
    dx = empty_aligned(x, columns)[:, : x.shape[1]]
    return dx, *(torch.empty_like(matrix, dtype=dtype) for matrix in lora)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, weights_out, lora, a, b, ctx.scales, ctx.silu, _, ctx.fp8 = inputs
    ctx.save_for_backward(x, *output[1:], *lora, *weights, *weights_out)
    ctx.weight_count, ctx.weight_out_count = len(weights), len(weights_out)
    ctx.dtype, ctx.ranks, ctx.sizes = a[0].dtype, [len(p) for p in a], [len(p) for p in b]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)  # read once: under recompute they unpack only once
    activations, lora, weights = saved[:4], saved[4:8], saved[8:]
    frozen = ([None] * ctx.weight_count, [None] * ctx.weight_out_count, [None] * 4)
    if dy is None:
        return None, *frozen, [None] * 3, [None] * 3, None, None, None, None
    dx, da, db, da_out, db_out = _backward(
        dy.contiguous(),
        activations,
        weights[: ctx.weight_count],
        weights[ctx.weight_count :],
        lora,
        ctx.scales,
        ctx.silu,
        ctx.fp8,
    )
    a_grads = [*da.to(ctx.dtype).split_with_sizes(ctx.ranks[:2]), da_out.to(ctx.dtype)]
    b_grads = [*db.to(ctx.dtype).split_with_sizes(ctx.sizes[:2]), db_out.to(ctx.dtype)]
    return dx, *frozen, a_grads, b_grads, None, None, None, None


_mlp.register_autograd(_autograd_backward, setup_context=_setup_context)
