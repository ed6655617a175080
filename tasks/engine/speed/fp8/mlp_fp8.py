"""The fused MLP's products with frozen weights in 8-bit floats (tasks.engine.speed.fp8.matmul).

Frozen weights, and what is multiplied with them forward and backward, are 8 bits; so down's adapter takes the quantized
h, and the adapters of gate and up get the gradient of their input from the quantized d_gate_up. The LoRA gradients, the
activation and all sums are as in tasks.engine.speed.fused_lora.mlp_dense, which has the formulas.

Shapes: T tokens, K inputs, N outputs, F ffn, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.fp8 import matmul
from tasks.engine.speed.fused_lora.linear import as_base_tensor
from tasks.engine.speed.fused_lora.mlp_dense import LoraMatrices, add_b_gradients, gated_activation_backward


def forward(
    x: Tensor, weights: list[Tensor], weights_out: list[Tensor], lora: LoraMatrices, silu: bool, save_gate_up: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, N), xa (T, 2r), ha (T, r) and gate_up (T, 2F), empty unless saved, of x (T, K)."""
    xa = torch.mm(x, lora.a.T)
    gate_up = _gate_up(x, xa, weights)
    h, scale = _quantized_activation(gate_up, silu)
    y, ha = _split_tall_product(
        matmul.scaled_matmul(h, scale, weights_out[2], weights_out[3], x.dtype), *lora.b_out.shape
    )
    return (
        as_base_tensor(y.addmm_(ha, lora.b_out.T)),
        xa,
        ha,
        gate_up if save_gate_up else x.new_empty((0, len(lora.b))),
    )


def backward(
    dy: Tensor, saved: list[Tensor], weights: list[Tensor], weights_out: list[Tensor], lora: LoraMatrices,
    grads: LoraMatrices, scales: list[float], silu: bool,
) -> Tensor:  # fmt: skip
    """Gradient of x (T, K) from dy (T, N); the LoRA gradients are added to `grads`."""
    x, xa, ha, gate_up_buffer = saved
    dha = torch.mm(dy, lora.b_out)
    add_product(grads.b_out, dy.T, ha, scales[2])
    quantized, scale = matmul.quantize_with_lora(dy, dha)
    dh = matmul.scaled_matmul(quantized, scale, weights_out[0], weights_out[1], x.dtype)
    gate_up = gate_up_buffer if len(gate_up_buffer) else _gate_up(x, xa, weights)
    quantized, scale, d_gate_up, h = _quantized_activation_backward(gate_up, dh, silu)
    add_product(grads.a_out, dha.T, h)
    add_b_gradients(grads.b, d_gate_up, xa, scales)
    dx, dxa = _split_tall_product(
        matmul.scaled_matmul(quantized, scale, weights[2], weights[3], x.dtype), x.shape[1], len(lora.a)
    )
    add_product(grads.a, dxa.T, x)
    return as_base_tensor(dx.addmm_(dxa, lora.a))


def _gate_up(x: Tensor, xa: Tensor, weights: list[Tensor]) -> Tensor:
    """[gate | up] (T, 2F)."""
    quantized, scale = matmul.quantize_with_lora(x, xa)
    return matmul.scaled_matmul(quantized, scale, weights[0], weights[1], x.dtype)


def _split_tall_product(product: Tensor, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """The two parts g W and g L = g hi L + g lo L of a product with `tall`."""
    lora_columns = matmul.padded_rank(rank)
    high, low = product[:, columns : columns + rank], product[:, columns + lora_columns : columns + lora_columns + rank]
    return product[:, :columns], high + low


def _quantized_activation(gate_up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """h = act(gate) * up (T, F) quantized, and its rows' scales (T, 1)."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import gated_activation  # noqa: PLC0415  # Triton is where CUDA is

        return gated_activation(gate_up, silu)
    gate, up = gate_up.chunk(2, 1)
    return matmul.quantize_rows((F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up)


def _quantized_activation_backward(gate_up: Tensor, dh: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of gate_up quantized, its scales, the gradient itself, and h; `dh` is overwritten."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fp8.fp8_kernel import gated_activation_backward as kernel  # noqa: PLC0415

        return kernel(gate_up, dh, silu)
    d_gate_up, h = gated_activation_backward(gate_up, dh, silu, in_place=False)
    return *matmul.quantize_rows(d_gate_up), d_gate_up, h
