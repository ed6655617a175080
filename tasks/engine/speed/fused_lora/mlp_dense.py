"""The products of tasks.engine.speed.fused_lora.mlp on dense or NF4 weights, some thousand tokens at a time.

The wide middle lives for `CHUNK` tokens only unless it is kept, and one kernel turns it into its gradient in place.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.fused_lora.linear import alone, extended_weight, room

CHUNK = 4096


class Lows(NamedTuple):
    """Low ranks as tasks.engine.speed.fused_lora.linear stacks them, or sums of their gradients: gate's and up's,
    and down's."""

    a: Tensor
    b: Tensor
    a_out: Tensor
    b_out: Tensor


def forward(
    x: Tensor, weights: list[Tensor], weights_out: list[Tensor], low: Lows, silu: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fused_mlp` gives for x (M, K)."""
    weight, weight_out = _extended(weights, weights_out, low)
    (outputs, rank), xa = low.b_out.shape, torch.mm(x, low.a.T)
    both, middle = room(x, outputs + rank), x.new_empty((len(x) if keep else 0, len(low.b)))
    for rows in _chunks(len(x)):
        gate_up = torch.mm(torch.cat([x[rows], xa[rows]], 1), weight.T, out=middle[rows] if keep else None)
        torch.mm(_gated(gate_up, silu), weight_out.T, out=both[rows])
        del gate_up
    ha = both[:, outputs:].contiguous()
    return alone(both[:, :outputs].addmm_(ha, low.b_out.T)), xa, ha, middle


def backward(
    grad: Tensor, kept: list[Tensor], weights: list[Tensor], weights_out: list[Tensor], low: Lows, sums: Lows,
    scales: list[float], silu: bool,
) -> Tensor:  # fmt: skip
    """The gradient of x; those of the low ranks are added to `sums`."""
    x, xa, ha, middle = kept
    weight, weight_out = _extended(weights, weights_out, low)
    inputs, dha = x.shape[1], torch.mm(grad, low.b_out)
    add_product(sums.b_out, grad.T, ha, scales[2])
    both, grad = room(x, inputs + len(low.a)), torch.cat([grad, dha], 1)
    for rows in _chunks(len(x)):
        gate_up = middle[rows] if len(middle) else torch.mm(torch.cat([x[rows], xa[rows]], 1), weight.T)
        dgate_up, h = gate_backward(gate_up, torch.mm(grad[rows], weight_out), silu, in_place=not len(middle))
        add_product(sums.a_out, dha[rows].T, h)
        torch.mm(dgate_up, weight, out=both[rows])
        add_sides(sums.b, dgate_up, xa[rows], scales)
        del gate_up, dgate_up, h  # or the next rows' would be made beside them
    dx, dxa = both[:, :inputs], both[:, inputs:]
    dx.addmm_(dxa, low.a)
    add_product(sums.a, dxa.T, x)
    return alone(dx)


def add_sides(total: Tensor, dgate_up: Tensor, xa: Tensor, scales: list[float]) -> None:
    """Adds the gradients of gate's and of up's B (2F, r), each from its own half of both."""
    halves = zip(total.chunk(2), dgate_up.chunk(2, 1), xa.chunk(2, 1), scales, strict=False)
    for half, side, low, scale in halves:
        add_product(half, side.T, low, scale)


def _extended(weights: list[Tensor], weights_out: list[Tensor], low: Lows) -> tuple[Tensor, Tensor]:
    width, outputs = low.a_out.shape[1], len(low.b_out)
    weight = extended_weight(weights[0], weights[1:], low.a, low.b, [width, width])
    return weight, extended_weight(weights_out[0], weights_out[1:], low.a_out, low.b_out, [outputs])


def _chunks(tokens: int) -> list[slice]:
    step = -(-tokens // max(1, -(-tokens // CHUNK)))
    step = -(-step // 128) * 128
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _gated(gate_up: Tensor, silu: bool) -> Tensor:
    """act(gate) * up (M, F) of (M, 2F)."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fused_lora.mlp_kernel import forward  # noqa: PLC0415  # Triton is where CUDA is

        return forward(gate_up, silu)
    gate, up = gate_up.chunk(2, 1)
    return (F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up


def gate_backward(gate_up: Tensor, dh: Tensor, silu: bool, in_place: bool) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, h), in the places of `gate_up` and `dh` with `in_place`; `dh` is lost either way."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fused_lora.mlp_kernel import backward  # noqa: PLC0415

        return backward(gate_up, dh, silu, in_place)
    gate, up = gate_up.chunk(2, 1)
    act = F.silu(gate) if silu else F.gelu(gate, approximate="tanh")
    slope = dh * up
    if silu:
        slope = torch.ops.aten.silu_backward(slope, gate)
    else:
        slope = torch.ops.aten.gelu_backward(slope, gate, approximate="tanh")
    return torch.cat([slope, dh * act], 1), act * up
