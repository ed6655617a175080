"""Fused MLP with LoRA whose frozen weights are multiplied in 8-bit floats (tasks.engine.speed.fp8.matmul).

In 8 bits are what meets a frozen weight and the weight itself, forward and backward; so down's adapter takes the
quantized middle, and the adapters of gate and up get their input's gradient from the quantized one. Their own
gradients, the gate and all sums are as ever.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.fp8 import matmul
from tasks.engine.speed.fused_lora.linear import alone
from tasks.engine.speed.fused_lora.mlp_dense import Lows, add_sides, gate_backward


def forward(
    x: Tensor, small: list[Tensor], small_out: list[Tensor], low: Lows, silu: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fused_mlp` gives for x (M, K)."""
    xa = torch.mm(x, low.a.T)
    gate_up = _middle(x, xa, small)
    h, scale = _gated(gate_up, silu)
    y, ha = _apart(matmul.product(h, scale, small_out[2], small_out[3], x.dtype), *low.b_out.shape)
    return alone(y.addmm_(ha, low.b_out.T)), xa, ha, gate_up if keep else x.new_empty((0, len(low.b)))


def backward(
    grad: Tensor, kept: list[Tensor], small: list[Tensor], small_out: list[Tensor], low: Lows, sums: Lows,
    scales: list[float], silu: bool,
) -> Tensor:  # fmt: skip
    """The gradient of x; those of the low ranks are added to `sums`."""
    x, xa, ha, middle = kept
    dha = torch.mm(grad, low.b_out)
    add_product(sums.b_out, grad.T, ha, scales[2])
    given, scale = matmul.quantize(grad, dha)
    dh = matmul.product(given, scale, small_out[0], small_out[1], x.dtype)
    gate_up = middle if len(middle) else _middle(x, xa, small)
    given, scale, dgate_up, h = _gated_backward(gate_up, dh, silu)
    add_product(sums.a_out, dha.T, h)
    add_sides(sums.b, dgate_up, xa, scales)
    dx, dxa = _apart(matmul.product(given, scale, small[2], small[3], x.dtype), x.shape[1], len(low.a))
    add_product(sums.a, dxa.T, x)
    return alone(dx.addmm_(dxa, low.a))


def _middle(x: Tensor, xa: Tensor, small: list[Tensor]) -> Tensor:
    """gate and up (M, 2F)."""
    given, scale = matmul.quantize(x, xa)
    return matmul.product(given, scale, small[0], small[1], x.dtype)


def _apart(both: Tensor, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """A product with `tall`: its part of the weight, and the low rank's two halves added up."""
    room = matmul.padded(rank)
    high, rest = both[:, columns : columns + rank], both[:, columns + room : columns + room + rank]
    return both[:, :columns], high + rest


def _gated(gate_up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """act(gate) * up (M, F) quantized, and its scales (M, 1)."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import gate  # noqa: PLC0415  # Triton is where CUDA is

        return gate(gate_up, silu)
    left, up = gate_up.chunk(2, 1)
    return matmul.quantize_rows((F.silu(left) if silu else F.gelu(left, approximate="tanh")) * up)


def _gated_backward(gate_up: Tensor, dh: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate_up quantized, its scales, the gradient itself, and act(gate) * up; `dh` is lost."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import gate_backward as kernel  # noqa: PLC0415

        return kernel(gate_up, dh, silu)
    dgate_up, h = gate_backward(gate_up, dh, silu, in_place=False)
    return *matmul.quantize_rows(dgate_up), dgate_up, h
