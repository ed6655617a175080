"""LoRA of linear layers that share one input, in few large matrix products; the parameters stay peft's.

A layer's product x W' + s (x A') B' costs two thin products, an addition over the whole output and, in backward, as
many again. Here the low rank rides along in the large products. Where the input is the thin side (K <= N: q/k/v,
gate/up), the weight is extended by columns:

    y = [x | x A'] [W | sB]'          [dx | d(xA')] = dy [W | sB],  dx += d(xA') A

and where the output is (down), by rows:

    [y | x A'] = x [W ; A]',  y += (x A') sB'          dx = [dy | dy sB] [W ; A]

Several layers are stacked: their weights below each other, their sB in a block diagonal. A dense base weight moves into
the extended one for good (peft's module keeps a view of it); an NF4 one is dequantized into it for each pass and never
kept. Adapters are multiplied in the base's dtype from copies of peft's float32 parameters. Who holds all this is
tasks.engine.speed.fused_lora.group.

Shapes: M tokens, K inputs, N outputs of all members together, r rank, R = r * members.
"""

from typing import Any

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.fused_lora.nf4_dequantize import PARTS, read_nf4

ALIGNED = 8  # elements of half precision: 16 bytes


def empty_extended(
    outputs: int, inputs: int, rank: int, members: int, by_columns: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Room for the extended weight; what the low rank never fills is 0."""
    if by_columns:  # what lies beside the diagonal of the sB stays 0
        extended = torch.empty((outputs, inputs + rank * members), dtype=dtype, device=device)
        extended[:, inputs:] = 0
        return extended
    return torch.empty((outputs + rank, inputs), dtype=dtype, device=device)


def fill_adapters(
    extended: Tensor, low_a: Tensor, low_b: Tensor, sizes: list[int], by_columns: bool, start: int = 0
) -> None:
    """Puts the low rank into `extended`, of which the rows from `start` on are there."""
    inputs, rank = low_a.shape[1], low_b.shape[1]
    places = [(sum(sizes), 0, low_a)]
    if by_columns:
        rows = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = low_b.split_with_sizes(sizes)
        places = [(row, inputs + i * rank, part) for i, (row, part) in enumerate(zip(rows, parts, strict=True))]
    for row, column, part in places:
        first, last = max(row, start), min(row + len(part), start + len(extended))
        if first < last:
            into = extended[first - start : last - start, column : column + part.shape[1]]
            into.copy_(part[first - row : last - row])


def extended_weight(
    extended: Tensor, quantized: list[Tensor], low_a: Tensor, low_b: Tensor, sizes: list[int]
) -> Tensor:
    """The extended weight: kept, or made of NF4 for this pass."""
    if not quantized:
        return extended
    (outputs, rank), inputs, by_columns = low_b.shape, low_a.shape[1], _by_columns(low_a, low_b)
    made = empty_extended(outputs, inputs, rank, len(sizes), by_columns, low_a.dtype, low_a.device)
    start = 0
    for i, size in enumerate(sizes):
        read_nf4(quantized[PARTS * i : PARTS * (i + 1)], made[start : start + size, :inputs])
        start += size
    fill_adapters(made, low_a, low_b, sizes, by_columns)
    return made


def _by_columns(low_a: Tensor, low_b: Tensor) -> bool:
    return low_a.shape[1] <= low_b.shape[0]


@torch.library.custom_op("stillhouse::lora_linear", mutates_args=())
def lora_linear(
    x: Tensor,
    extended: Tensor,
    quantized: list[Tensor],
    low_a: Tensor,
    low_b: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    sizes: list[int],
    scales: list[float],
) -> tuple[Tensor, Tensor]:
    """(y (M, N), x A' (M, R)) of x (M, K). `a` and `b` only receive the gradient: `low_a`, `low_b` are multiplied."""
    weight = extended_weight(extended, quantized, low_a, low_b, sizes)
    outputs = low_b.shape[0]
    if _by_columns(low_a, low_b):
        xa = torch.mm(x, low_a.T)
        return torch.mm(torch.cat([x, xa], 1), weight.T), xa
    both = torch.mm(x, weight.T, out=room(x, len(weight)))
    xa = both[:, outputs:].contiguous()
    return alone(both[:, :outputs].addmm_(xa, low_b.T)), xa


@lora_linear.register_fake
def _(x, extended, quantized, low_a, low_b, a, b, sizes, scales):  # type: ignore[no-untyped-def]
    outputs, rank = low_b.shape
    whole = _by_columns(low_a, low_b)
    y = x.new_empty((x.shape[0], outputs)) if whole else room(x, outputs + rank)[:, :outputs]
    return y, x.new_empty((x.shape[0], low_a.shape[0]))


@torch.library.custom_op("stillhouse::lora_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    extended: Tensor,
    quantized: list[Tensor],
    low_a: Tensor,
    low_b: Tensor,
    sizes: list[int],
    scales: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (M, K), and in float32 of the stacked A (R, K) and of the stacked B (N, r)."""
    weight = extended_weight(extended, quantized, low_a, low_b, sizes)
    rank, inputs = low_b.shape[1], low_a.shape[1]
    if _by_columns(low_a, low_b):
        both = torch.mm(grad, weight, out=room(grad, weight.shape[1]))
        dxa = both[:, inputs:]
        dx = alone(both[:, :inputs].addmm_(dxa, low_a))
    else:
        dxa = torch.mm(grad, low_b)
        dx = torch.mm(torch.cat([grad, dxa], 1), weight)
    exact = torch.promote_types(x.dtype, torch.float32)
    da, db = torch.zeros_like(low_a, dtype=exact), torch.zeros_like(low_b, dtype=exact)
    add_product(da, dxa.T, x)
    parts = zip(
        grad.split_with_sizes(sizes, 1),
        xa.split_with_sizes([rank] * len(sizes), 1),
        db.split_with_sizes(sizes),
        scales,
        strict=True,
    )
    for part, low, out, scale in parts:
        add_product(out, part.T, low, scale)
    return dx, da, db


@_backward.register_fake
def _(grad, x, xa, extended, quantized, low_a, low_b, sizes, scales):  # type: ignore[no-untyped-def]
    exact, inputs = torch.promote_types(x.dtype, torch.float32), low_a.shape[1]
    dx = room(x, inputs + len(low_a))[:, :inputs] if _by_columns(low_a, low_b) else x.new_empty((x.shape[0], inputs))
    return dx, torch.empty_like(low_a, dtype=exact), torch.empty_like(low_b, dtype=exact)


def room(x: Tensor, columns: int) -> Tensor:
    """Empty columns for each row of x. Every row begins at 16 bytes: attention's kernels take it for granted of what
    they are given in the backward, whatever the strides say."""
    return x.new_empty((x.shape[0], -(-columns // ALIGNED) * ALIGNED))[:, :columns]


def alone(part: Tensor) -> Tensor:
    """A view as a tensor of its own: autograd lets nobody change a view in place that an operation gave out."""
    return part.new_empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, extended, quantized, low_a, low_b, a, _, ctx.sizes, ctx.scales = inputs
    ctx.save_for_backward(x, output[1], extended, low_a, low_b, *quantized)
    ctx.rank, ctx.dtype = len(a[0]), a[0].dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, xa, extended, low_a, low_b, *quantized = ctx.saved_tensors
    members = len(ctx.sizes)
    if grad is None:
        return None, None, [None] * len(quantized), None, None, [None] * members, [None] * members, None, None
    grad = grad.contiguous()
    dx, da, db = _backward(grad, x, xa, extended, quantized, low_a, low_b, ctx.sizes, ctx.scales)
    da_parts = list(da.to(ctx.dtype).split(ctx.rank))
    db_parts = list(db.to(ctx.dtype).split_with_sizes(ctx.sizes))
    return dx, None, [None] * len(quantized), None, None, da_parts, db_parts, None, None


lora_linear.register_autograd(_gradients, setup_context=_keep)
