"""tasks.engine.fused_mlp with the frozen weights multiplied in 8-bit floats (tasks.engine.fused_fp8).

In 8 bits are what meets a frozen weight and the weight itself, forward and backward; so down's adapter takes the
quantized middle, and the adapters of gate and up get their input's gradient from the quantized one. Their own
gradients, the gate and all sums are as ever.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine import fused_fp8
from tasks.engine.fused_lora import LoraGroup, add_product, alone
from tasks.engine.fused_mlp import gate_backward


def gated_mlp(x: Tensor, expand: LoraGroup, contract: LoraGroup, silu: bool, keep: bool) -> Tensor:
    """As `fused_mlp.gated_mlp`, of groups in 8 bits."""
    (a, b), (a_out, b_out) = expand.adapters(), contract.adapters()
    weights = (expand.in_8_bits(), expand.low_a, expand.low_b, contract.in_8_bits(), contract.low_a, contract.low_b)
    scales = [*expand.scales, *contract.scales]
    return cast(Tensor, _mlp(x, *weights, [*a, *a_out], [*b, *b_out], scales, silu, keep)[0])


@torch.library.custom_op("stillhouse::gated_mlp_fp8", mutates_args=())
def _mlp(
    x: Tensor,
    small: list[Tensor],
    low_a: Tensor,
    low_b: Tensor,
    small_out: list[Tensor],
    low_a_out: Tensor,
    low_b_out: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (M, N), x A' (M, 2r), h A' (M, r), and the middle (M, 2F) or nothing of it."""
    xa = torch.mm(x, low_a.T)
    gate_up = _middle(x, xa, small)
    h, scale = _gated(gate_up, silu)
    outputs, rank = low_b_out.shape
    y, ha = _apart(fused_fp8.product(h, scale, small_out[2], small_out[3], x.dtype), outputs, rank)
    return alone(y.addmm_(ha, low_b_out.T)), xa, ha, gate_up if keep else x.new_empty((0, len(low_b)))


@_mlp.register_fake
def _shapes(x: Tensor, *weights: Any) -> tuple[Tensor, ...]:
    _, low_a, low_b, small_out, _, low_b_out, *_, keep = weights
    (outputs, rank), tokens = low_b_out.shape, x.shape[0]
    y = x.new_empty((tokens, small_out[2].shape[0]))[:, :outputs]
    thin = x.new_empty((tokens, low_a.shape[0])), x.new_empty((tokens, rank))
    return y, *thin, x.new_empty((tokens if keep else 0, low_b.shape[0]))


@torch.library.custom_op("stillhouse::gated_mlp_fp8_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    ha: Tensor,
    middle: Tensor,
    small: list[Tensor],
    low_a: Tensor,
    low_b: Tensor,
    small_out: list[Tensor],
    low_a_out: Tensor,
    low_b_out: Tensor,
    scales: list[float],
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and in float32 of the stacked A and B of gate and up, and of down's A and B."""
    width, rank = low_a_out.shape[1], low_b_out.shape[1]
    exact = torch.promote_types(x.dtype, torch.float32)
    da, db, da_out, db_out = (torch.zeros_like(low, dtype=exact) for low in (low_a, low_b, low_a_out, low_b_out))
    dha = torch.mm(grad, low_b_out)
    add_product(db_out, grad.T, ha, scales[2])
    given, scale = fused_fp8.quantize(grad, dha)
    dh = fused_fp8.product(given, scale, small_out[0], small_out[1], x.dtype)
    gate_up = middle if len(middle) else _middle(x, xa, small)
    given, scale, dgate_up, h = _gated_backward(gate_up, dh, silu)
    add_product(da_out, dha.T, h)
    for i in range(2):
        side, low = slice(i * width, (i + 1) * width), slice(i * rank, (i + 1) * rank)
        add_product(db[side], dgate_up[:, side].T, xa[:, low], scales[i])
    dx, dxa = _apart(fused_fp8.product(given, scale, small[2], small[3], x.dtype), x.shape[1], 2 * rank)
    add_product(da, dxa.T, x)
    return alone(dx.addmm_(dxa, low_a)), da, db, da_out, db_out


@_backward.register_fake
def _gradient_shapes(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    exact = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty((x.shape[0], others[3][2].shape[0]))[:, : x.shape[1]]
    return dx, *(torch.empty_like(others[i], dtype=exact) for i in (4, 5, 7, 8))


def _middle(x: Tensor, xa: Tensor, small: list[Tensor]) -> Tensor:
    """gate and up (M, 2F)."""
    given, scale = fused_fp8.quantize(x, xa)
    return fused_fp8.product(given, scale, small[0], small[1], x.dtype)


def _apart(both: Tensor, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """A product with `tall`: its part of the weight, and the low rank's two halves added up."""
    room = fused_fp8.padded(rank)
    high, rest = both[:, columns : columns + rank], both[:, columns + room : columns + room + rank]
    return both[:, :columns], high + rest


def _gated(gate_up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """act(gate) * up (M, F) quantized, and its scales (M, 1)."""
    if gate_up.is_cuda:
        from tasks.engine.fused_fp8_kernel import gate  # noqa: PLC0415  # Triton is where CUDA is

        return gate(gate_up, silu)
    left, up = gate_up.chunk(2, 1)
    return fused_fp8.quantize_rows((F.silu(left) if silu else F.gelu(left, approximate="tanh")) * up)


def _gated_backward(gate_up: Tensor, dh: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate_up quantized, its scales, the gradient itself, and act(gate) * up; `dh` is lost."""
    if gate_up.is_cuda:
        from tasks.engine.fused_fp8_kernel import gate_backward as kernel  # noqa: PLC0415

        return kernel(gate_up, dh, silu)
    dgate_up, h = gate_backward(gate_up, dh, silu, in_place=False)
    return *fused_fp8.quantize_rows(dgate_up), dgate_up, h


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, small, low_a, low_b, small_out, low_a_out, low_b_out, a, b, ctx.scales, ctx.silu, _ = inputs
    ctx.save_for_backward(x, *output[1:], low_a, low_b, low_a_out, low_b_out, *small, *small_out)
    ctx.dtype, ctx.ranks, ctx.sizes = a[0].dtype, [len(p) for p in a], [len(p) for p in b]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, xa, ha, middle, low_a, low_b, low_a_out, low_b_out, *small = ctx.saved_tensors
    none = [None] * fused_fp8.PARTS
    frozen: tuple[Any, ...] = (none, None, None, none, None, None)
    if grad is None:
        return None, *frozen, [None] * 3, [None] * 3, None, None, None
    parts = fused_fp8.PARTS
    dx, da, db, da_out, db_out = _backward(
        grad.contiguous(), x, xa, ha, middle, small[:parts], low_a, low_b, small[parts:], low_a_out, low_b_out,
        ctx.scales, ctx.silu,
    )  # fmt: skip
    das = [*da.to(ctx.dtype).split_with_sizes(ctx.ranks[:2]), da_out.to(ctx.dtype)]
    dbs = [*db.to(ctx.dtype).split_with_sizes(ctx.sizes[:2]), db_out.to(ctx.dtype)]
    return dx, *frozen, das, dbs, None, None, None


_mlp.register_autograd(_gradients, setup_context=_keep)
