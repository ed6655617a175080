"""LoRA linear layers that share one input, as few large matrix products; the parameters stay peft's.

Done apart, y = x W' + s (x A') B' costs two thin products, an addition over the whole output and, in the backward, as
many again. Here the low-rank factors are columns or rows of the large products. Where the input is the thin side
(K <= N: q/k/v, gate/up), the weight is extended by columns,

    y = [x | x A'] [W | sB]'          [dx | dxa] = dy [W | sB],  dx += dxa A

and where the output is (down), by rows:

    [y | xa] = x [W ; A]',  y += xa sB'          dx = [dy | dy sB] [W ; A]

with xa = x A' and the gradients dA = dxa' x, dB = s dy' xa. Stacked layers have their weights below each other, their
sB in a block diagonal. A dense base weight moves into the extended one for good (peft's module keeps a view of it); an
NF4 one is dequantized into it in each pass and not kept. `lora_a` and `lora_b` are A and sB in the base's dtype.
tasks.engine.speed.fused_lora.group holds these tensors.

Shapes: T tokens, K inputs, N outputs of all members together, r rank, R = r * members.
"""

from typing import Any

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.fused_lora.nf4_dequantize import PARTS, dequantize_nf4

ALIGNED = 8  # elements of half precision: 16 bytes


def empty_extended(
    outputs: int, inputs: int, rank: int, members: int, by_columns: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uninitialized extended weight; off-diagonal blocks of sB are 0."""
    if by_columns:
        extended = torch.empty((outputs, inputs + rank * members), dtype=dtype, device=device)
        extended[:, inputs:] = 0
        return extended
    return torch.empty((outputs + rank, inputs), dtype=dtype, device=device)


def fill_adapters(
    extended: Tensor, lora_a: Tensor, lora_b: Tensor, sizes: list[int], by_columns: bool, first_row: int = 0
) -> None:
    """Writes A or sB into `extended`, which holds the rows from `first_row` on (a shard) of the extended weight."""
    inputs, rank = lora_a.shape[1], lora_b.shape[1]
    blocks = [(sum(sizes), 0, lora_a)]
    if by_columns:
        rows = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = lora_b.split_with_sizes(sizes)
        blocks = [(row, inputs + i * rank, part) for i, (row, part) in enumerate(zip(rows, parts, strict=True))]
    for row, column, part in blocks:
        first, last = max(row, first_row), min(row + len(part), first_row + len(extended))
        if first < last:
            target = extended[first - first_row : last - first_row, column : column + part.shape[1]]
            target.copy_(part[first - row : last - row])


def extended_weight(
    extended: Tensor, quantized: list[Tensor], lora_a: Tensor, lora_b: Tensor, sizes: list[int]
) -> Tensor:
    """The stored extended weight, or for NF4 one that is dequantized for this pass."""
    if not quantized:
        return extended
    (outputs, rank), inputs, by_columns = lora_b.shape, lora_a.shape[1], _by_columns(lora_a, lora_b)
    weight = empty_extended(outputs, inputs, rank, len(sizes), by_columns, lora_a.dtype, lora_a.device)
    start = 0
    for i, size in enumerate(sizes):
        dequantize_nf4(quantized[PARTS * i : PARTS * (i + 1)], weight[start : start + size, :inputs])
        start += size
    fill_adapters(weight, lora_a, lora_b, sizes, by_columns)
    return weight


def _by_columns(lora_a: Tensor, lora_b: Tensor) -> bool:
    return lora_a.shape[1] <= lora_b.shape[0]


@torch.library.custom_op("stillhouse::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    extended: Tensor,
    quantized: list[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    sizes: list[int],
    scales: list[float],
) -> tuple[Tensor, Tensor]:
    """(y (T, N), xa (T, R)) of x (T, K). `a` and `b` only receive gradients; `lora_a` and `lora_b` are multiplied."""
    weight = extended_weight(extended, quantized, lora_a, lora_b, sizes)
    outputs = lora_b.shape[0]
    if _by_columns(lora_a, lora_b):
        xa = torch.mm(x, lora_a.T)
        return torch.mm(torch.cat([x, xa], 1), weight.T), xa
    y_xa = torch.mm(x, weight.T, out=empty_aligned(x, len(weight)))
    xa = y_xa[:, outputs:].contiguous()
    return as_base_tensor(y_xa[:, :outputs].addmm_(xa, lora_b.T)), xa


@lora_linear.register_fake
def _(x, extended, quantized, lora_a, lora_b, a, b, sizes, scales):  # type: ignore[no-untyped-def]
    outputs, rank = lora_b.shape
    by_columns = _by_columns(lora_a, lora_b)
    y = x.new_empty((x.shape[0], outputs)) if by_columns else empty_aligned(x, outputs + rank)[:, :outputs]
    return y, x.new_empty((x.shape[0], lora_a.shape[0]))


@torch.library.custom_op("stillhouse::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    xa: Tensor,
    extended: Tensor,
    quantized: list[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    sizes: list[int],
    scales: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (T, K), and in float32 of the stacked A (R, K) and B (N, r), from dy (T, N)."""
    weight = extended_weight(extended, quantized, lora_a, lora_b, sizes)
    rank, inputs = lora_b.shape[1], lora_a.shape[1]
    if _by_columns(lora_a, lora_b):
        dx_dxa = torch.mm(dy, weight, out=empty_aligned(dy, weight.shape[1]))
        dxa = dx_dxa[:, inputs:]
        dx = as_base_tensor(dx_dxa[:, :inputs].addmm_(dxa, lora_a))
    else:
        dxa = torch.mm(dy, lora_b)
        dx = torch.mm(torch.cat([dy, dxa], 1), weight)
    dtype = torch.promote_types(x.dtype, torch.float32)
    da, db = torch.zeros_like(lora_a, dtype=dtype), torch.zeros_like(lora_b, dtype=dtype)
    add_product(da, dxa.T, x)
    parts = zip(
        dy.split_with_sizes(sizes, 1),
        xa.split_with_sizes([rank] * len(sizes), 1),
        db.split_with_sizes(sizes),
        scales,
        strict=True,
    )
    for dy_part, xa_part, b_grad, scale in parts:
        add_product(b_grad, dy_part.T, xa_part, scale)
    return dx, da, db


@_backward.register_fake
def _(grad, x, xa, extended, quantized, lora_a, lora_b, sizes, scales):  # type: ignore[no-untyped-def]
    dtype, inputs = torch.promote_types(x.dtype, torch.float32), lora_a.shape[1]
    dx = (
        empty_aligned(x, inputs + len(lora_a))[:, :inputs]
        if _by_columns(lora_a, lora_b)
        else x.new_empty((x.shape[0], inputs))
    )
    return dx, torch.empty_like(lora_a, dtype=dtype), torch.empty_like(lora_b, dtype=dtype)


def empty_aligned(x: Tensor, columns: int) -> Tensor:
    """Empty tensor (T, columns) whose rows begin at multiples of 16 bytes.

    Attention's backward kernels assume that of the gradients they get, whatever the strides are.
    """
    return x.new_empty((x.shape[0], -(-columns // ALIGNED) * ALIGNED))[:, :columns]


def as_base_tensor(part: Tensor) -> Tensor:
    """The same memory as a tensor that is no view: autograd refuses to change an operator's output view in place."""
    return part.new_empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, extended, quantized, lora_a, lora_b, a, _, ctx.sizes, ctx.scales = inputs
    ctx.save_for_backward(x, output[1], extended, lora_a, lora_b, *quantized)
    ctx.rank, ctx.dtype = len(a[0]), a[0].dtype
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, xa, extended, lora_a, lora_b, *quantized = ctx.saved_tensors
    members = len(ctx.sizes)
    if grad is None:
        return None, None, [None] * len(quantized), None, None, [None] * members, [None] * members, None, None
    grad = grad.contiguous()
    dx, da, db = _backward(grad, x, xa, extended, quantized, lora_a, lora_b, ctx.sizes, ctx.scales)
    a_grads = list(da.to(ctx.dtype).split(ctx.rank))
    b_grads = list(db.to(ctx.dtype).split_with_sizes(ctx.sizes))
    return dx, None, [None] * len(quantized), None, None, a_grads, b_grads, None, None


lora_linear.register_autograd(_autograd_backward, setup_context=_setup_context)
