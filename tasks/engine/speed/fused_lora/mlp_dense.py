"""The fused MLP's products on dense or NF4 weights, a chunk of tokens at a time (tasks.engine.speed.fused_lora.mlp).

Unless it is saved, gate_up exists for `CHUNK` tokens only; one kernel replaces it by its gradient in place. With
s the LoRA scale and act the activation:

    dha = dy sB_out              dh = dy W_down + dha A_out         [d_gate | d_up] = [dh up act'(gate) | dh act(gate)]
    dxa = d_gate_up sB           dx = d_gate_up W + dxa A           dA = dxa' x     dB = s d_gate_up' xa    (down alike)

Shapes: T tokens, K inputs, N outputs, F ffn, r rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.fused_lora.linear import as_base_tensor, empty_aligned, extended_weight

CHUNK = 4096


class LoraMatrices(NamedTuple):
    """LoRA matrices A and sB of gate and up (stacked as in tasks.engine.speed.fused_lora.linear) and of down (`_out`).

    Also their gradients.
    """

    a: Tensor
    b: Tensor
    a_out: Tensor
    b_out: Tensor


def forward(
    x: Tensor, weights: list[Tensor], weights_out: list[Tensor], lora: LoraMatrices, silu: bool, save_gate_up: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, N), xa (T, 2r), ha (T, r) and gate_up (T, 2F), empty unless saved, of x (T, K)."""
    weight, weight_out = _extended(weights, weights_out, lora)
    (outputs, rank), xa = lora.b_out.shape, torch.mm(x, lora.a.T)
    y_ha, gate_up_buffer = empty_aligned(x, outputs + rank), x.new_empty((len(x) if save_gate_up else 0, len(lora.b)))
    for rows in _chunks(len(x)):
        gate_up = torch.mm(
            torch.cat([x[rows], xa[rows]], 1), weight.T, out=gate_up_buffer[rows] if save_gate_up else None
        )
        torch.mm(_gated_activation(gate_up, silu), weight_out.T, out=y_ha[rows])
        del gate_up
    ha = y_ha[:, outputs:].contiguous()
    return as_base_tensor(y_ha[:, :outputs].addmm_(ha, lora.b_out.T)), xa, ha, gate_up_buffer


def backward(
    dy: Tensor, saved: list[Tensor], weights: list[Tensor], weights_out: list[Tensor], lora: LoraMatrices,
    grads: LoraMatrices, scales: list[float], silu: bool,
) -> Tensor:  # fmt: skip
    """Gradient of x (T, K) from dy (T, N); the LoRA gradients are added to `grads`."""
    x, xa, ha, gate_up_buffer = saved
    weight, weight_out = _extended(weights, weights_out, lora)
    inputs, dha = x.shape[1], torch.mm(dy, lora.b_out)
    add_product(grads.b_out, dy.T, ha, scales[2])
    dx_dxa, dy = empty_aligned(x, inputs + len(lora.a)), torch.cat([dy, dha], 1)
    for rows in _chunks(len(x)):
        gate_up = gate_up_buffer[rows] if len(gate_up_buffer) else torch.mm(torch.cat([x[rows], xa[rows]], 1), weight.T)
        d_gate_up, h = gated_activation_backward(
            gate_up, torch.mm(dy[rows], weight_out), silu, in_place=not len(gate_up_buffer)
        )
        add_product(grads.a_out, dha[rows].T, h)
        torch.mm(d_gate_up, weight, out=dx_dxa[rows])
        add_b_gradients(grads.b, d_gate_up, xa[rows], scales)
        del gate_up, d_gate_up, h  # freed before the next chunk's are allocated
    dx, dxa = dx_dxa[:, :inputs], dx_dxa[:, inputs:]
    dx.addmm_(dxa, lora.a)
    add_product(grads.a, dxa.T, x)
    return as_base_tensor(dx)


def add_b_gradients(b_grad: Tensor, d_gate_up: Tensor, xa: Tensor, scales: list[float]) -> None:
    """Adds the gradients of gate's and up's B (2F, r), each from its half of d_gate_up (T, 2F) and xa (T, 2r)."""
    halves = zip(b_grad.chunk(2), d_gate_up.chunk(2, 1), xa.chunk(2, 1), scales, strict=False)
    for half_grad, d_half, half_xa, scale in halves:
        add_product(half_grad, d_half.T, half_xa, scale)


def _extended(weights: list[Tensor], weights_out: list[Tensor], lora: LoraMatrices) -> tuple[Tensor, Tensor]:
    ffn, outputs = lora.a_out.shape[1], len(lora.b_out)
    weight = extended_weight(weights[0], weights[1:], lora.a, lora.b, [ffn, ffn])
    return weight, extended_weight(weights_out[0], weights_out[1:], lora.a_out, lora.b_out, [outputs])


def _chunks(tokens: int) -> list[slice]:
    step = -(-tokens // max(1, -(-tokens // CHUNK)))
    step = -(-step // 128) * 128
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _gated_activation(gate_up: Tensor, silu: bool) -> Tensor:
    """h = act(gate) * up (T, F) of gate_up (T, 2F)."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fused_lora.mlp_kernel import forward  # noqa: PLC0415  # Triton is where CUDA is

        return forward(gate_up, silu)
    gate, up = gate_up.chunk(2, 1)
    return (F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up


def gated_activation_backward(gate_up: Tensor, dh: Tensor, silu: bool, in_place: bool) -> tuple[Tensor, Tensor]:
    """Gradient of gate_up, and h; `in_place` writes the former into `gate_up`. `dh` is overwritten either way."""
    if gate_up.is_cuda:
        from tasks.engine.speed.fused_lora.mlp_kernel import backward  # noqa: PLC0415

        return backward(gate_up, dh, silu, in_place)
    gate, up = gate_up.chunk(2, 1)
    act = F.silu(gate) if silu else F.gelu(gate, approximate="tanh")
    d_gate = dh * up
    if silu:
        d_gate = torch.ops.aten.silu_backward(d_gate, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(d_gate, gate, approximate="tanh")
    return torch.cat([d_gate, dh * act], 1), act * up
