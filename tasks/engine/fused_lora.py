"""LoRA of linear layers that share one input, in few large matrix products; the parameters stay peft's.

A layer's product x W' + s (x A') B' costs two thin products, an addition over the whole output and, in backward, as
many again. Here the low rank rides along in the large products. Where the input is the thin side (K <= N: q/k/v,
gate/up), the weight is extended by columns:

    y = [x | x A'] [W | sB]'          [dx | d(xA')] = dy [W | sB],  dx += d(xA') A

and where the output is (down), by rows:

    [y | x A'] = x [W ; A]',  y += (x A') sB'          dx = [dy | dy sB] [W ; A]

Several layers are stacked: their weights below each other, their sB in a block diagonal. A dense base weight moves into
the extended one for good (peft's module keeps a view of it); an NF4 one is dequantized into it for each pass and never
kept. Adapters are multiplied in the base's dtype from copies that `refresh` takes of peft's float32 parameters.

Shapes: M tokens, K inputs, N outputs of all members together, r rank, R = r * members.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tasks.engine import fused_fp8
from tasks.engine.fused_fp8 import fill, quantize_weight
from tasks.engine.fused_nf4 import PARTS, nf4_parts, read_nf4

ADAPTER = "default"


class LoraGroup(nn.Module):
    """Members' outputs (..., N_i) from their common input (..., K). Holds buffers only: members keep their place.

    With `fp8` the weights are kept in 8 bits, for tasks.engine.fused_mlp_fp8 to multiply, and peft's modules have none
    left: NaN in their place.
    """

    extended: Tensor
    low_a: Tensor
    low_b: Tensor
    bias: Tensor | None

    def __init__(self, members: Sequence[LoraLayer], fp8: bool = False) -> None:
        super().__init__()
        self.members = tuple(members)  # no children: their parameters have one name, peft's
        bases = [cast(nn.Linear, member.get_base_layer()) for member in members]
        self.sizes = [base.out_features for base in bases]
        self.scales = [float(member.scaling[ADAPTER]) for member in members]
        inputs, outputs, rank = bases[0].in_features, sum(self.sizes), members[0].r[ADAPTER]
        self.by_columns = inputs <= outputs
        quantized = [nf4_parts(base.weight) for base in bases]
        self.quantized, self.fp8 = quantized[0] is not None, fp8
        if fp8:
            dtype, device = bases[0].weight.dtype, bases[0].weight.device
            self._to_fp8(bases, rank * len(bases))
            extended = torch.empty(0, dtype=dtype, device=device)
        elif self.quantized:
            for i, part in enumerate(part for parts in quantized for part in parts or ()):
                self.register_buffer(f"quantized_{i}", part, persistent=False)
            dtype, device = cast(Any, bases[0].weight).quant_state.dtype, bases[0].weight.device
            extended = torch.empty(0, dtype=dtype, device=device)
        else:
            dtype, device = bases[0].weight.dtype, bases[0].weight.device
            extended = _empty_extended(outputs, inputs, rank, len(bases), self.by_columns, dtype, device)
            start = 0
            for base in bases:
                place = extended[start : start + base.out_features, :inputs]
                place.copy_(base.weight.data)
                base.weight.data = place
                start += base.out_features
        self.register_buffer("extended", extended, persistent=False)
        shape = (rank * len(bases), inputs)
        self.register_buffer("low_a", torch.empty(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("low_b", torch.empty((outputs, rank), dtype=dtype, device=device), persistent=False)
        biases = [base.bias for base in bases]
        stacked = None
        if any(bias is not None for bias in biases):
            zeros = [torch.zeros(size, dtype=dtype, device=device) for size in self.sizes]
            stacked = torch.cat([z if bias is None else bias.data for bias, z in zip(biases, zeros, strict=True)])
        self.register_buffer("bias", stacked, persistent=False)

    def _to_fp8(self, bases: list[nn.Linear], rank: int) -> None:
        """Quantizes the stacked weights once and lets go of the dense ones."""
        weight = torch.cat([base.weight.data for base in bases])
        for i, part in enumerate(quantize_weight(weight if self.by_columns else weight.t(), rank)):
            self.register_buffer(f"small_{i}", part, persistent=False)
        nothing = weight.new_full((), torch.nan)
        for base in bases:
            base.weight.data = nothing.expand(base.weight.shape)

    def in_8_bits(self) -> list[Tensor]:
        """wide and tall of tasks.engine.fused_fp8 with their scales: of the weight, or its transpose where the low
        rank is A's."""
        return [getattr(self, f"small_{i}") for i in range(fused_fp8.PARTS)]

    def adapters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Members' A (r, K) and B (N_i, r)."""
        return (
            [cast(Any, member).lora_A[ADAPTER].weight for member in self.members],
            [cast(Any, member).lora_B[ADAPTER].weight for member in self.members],
        )

    def quantized_parts(self) -> list[Tensor]:
        """Members' NF4 tensors, one behind the other; none for a dense base."""
        return [getattr(self, f"quantized_{i}") for i in range(PARTS * len(self.sizes))] if self.quantized else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output a member, in the base's dtype."""
        a, b = self.adapters()
        parts = self.quantized_parts()
        flat = x.flatten(0, -2).to(self.low_a.dtype)
        y, _ = lora_linear(flat, self.extended, parts, self.low_a, self.low_b, a, b, self.sizes, self.scales)
        if self.bias is not None:
            y = y + self.bias
        y = y.unflatten(0, x.shape[:-1])
        return y.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (y,)


@torch.no_grad()
def refresh(groups: Iterable[LoraGroup]) -> None:
    """Takes peft's adapters into the groups' own dtype: before a forward, whenever an optimizer may have moved them."""
    groups = list(groups)
    if not groups:
        return
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for group in groups:
        a, b = group.adapters()
        targets += [
            *group.low_a.split_with_sizes([len(part) for part in a]),
            *group.low_b.split_with_sizes(group.sizes),
        ]
        sources += [*a, *torch._foreach_mul(list(b), group.scales)]
    torch._foreach_copy_(targets, sources)
    small = [group for group in groups if group.fp8]
    lows = [group.low_b if group.by_columns else group.low_a.t() for group in small]
    for group, low, most in zip(small, lows, torch._foreach_norm(lows, torch.inf) if lows else [], strict=True):
        fill(group.in_8_bits(), low, len(group.members) if group.by_columns else 1, most)
    for group in groups:
        if not (group.quantized or group.fp8):
            _fill_adapters(group.extended, group.low_a, group.low_b, group.sizes, group.by_columns)


def _empty_extended(
    outputs: int, inputs: int, rank: int, members: int, by_columns: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if by_columns:  # what lies beside the diagonal of the sB stays 0
        extended = torch.empty((outputs, inputs + rank * members), dtype=dtype, device=device)
        extended[:, inputs:] = 0
        return extended
    return torch.empty((outputs + rank, inputs), dtype=dtype, device=device)


def _fill_adapters(extended: Tensor, low_a: Tensor, low_b: Tensor, sizes: list[int], by_columns: bool) -> None:
    inputs, rank = low_a.shape[1], low_b.shape[1]
    if not by_columns:
        extended[sum(sizes) :].copy_(low_a)
        return
    row, column = 0, inputs
    for part in low_b.split_with_sizes(sizes):
        extended[row : row + len(part), column : column + rank].copy_(part)
        row, column = row + len(part), column + rank


def extended_weight(
    extended: Tensor, quantized: list[Tensor], low_a: Tensor, low_b: Tensor, sizes: list[int]
) -> Tensor:
    """The extended weight: kept, or made of NF4 for this pass."""
    if not quantized:
        return extended
    (outputs, rank), inputs, by_columns = low_b.shape, low_a.shape[1], _by_columns(low_a, low_b)
    made = _empty_extended(outputs, inputs, rank, len(sizes), by_columns, low_a.dtype, low_a.device)
    start = 0
    for i, size in enumerate(sizes):
        read_nf4(quantized[PARTS * i : PARTS * (i + 1)], made[start : start + size, :inputs])
        start += size
    _fill_adapters(made, low_a, low_b, sizes, by_columns)
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
    both = torch.mm(x, weight.T)
    xa = both[:, outputs:].contiguous()
    return alone(both[:, :outputs].addmm_(xa, low_b.T)), xa


@lora_linear.register_fake
def _(x, extended, quantized, low_a, low_b, a, b, sizes, scales):  # type: ignore[no-untyped-def]
    outputs, rank = low_b.shape
    y = x.new_empty((x.shape[0], outputs + (0 if _by_columns(low_a, low_b) else rank)))[:, :outputs]
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
        both = torch.mm(grad, weight)
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
    dx = x.new_empty((x.shape[0], inputs + (low_a.shape[0] if _by_columns(low_a, low_b) else 0)))[:, :inputs]
    return dx, torch.empty_like(low_a, dtype=exact), torch.empty_like(low_b, dtype=exact)


def alone(part: Tensor) -> Tensor:
    """A view as a tensor of its own: autograd lets nobody change a view in place that an operation gave out."""
    return part.new_empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """total += scale * a @ b, in the dtype of `total`: float32 sums of half-precision products where torch has them."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, alpha=scale, out_dtype=torch.float32, out=total)
    else:
        total += scale * (a @ b)


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
