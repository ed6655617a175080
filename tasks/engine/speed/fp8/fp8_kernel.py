# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""`tasks.engine.speed.fp8.matmul` and the gate of an MLP in 8 bits as Triton kernels; a program has whole rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.fused_lora.mlp_kernel import _activation

SMALL = torch.float8_e4m3fn


def quantize(x: Tensor, low: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """As `fused_fp8.quantize`."""
    (rows, width), rank = x.shape, low.shape[1]
    out = torch.empty((rows, width + 3 * room), dtype=SMALL, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _quantize[(rows,)](
        x, low, out, scales, width, rank, room, x.stride(0), low.stride(0), BLOCK=triton.next_power_of_2(width),
        ROOM=triton.next_power_of_2(room), num_warps=4,
    )  # fmt: skip
    return out, scales


def fill(
    wide: Tensor, wide_scales: Tensor, tall: Tensor, tall_scales: Tensor, low: Tensor, members: int, most: Tensor,
    inputs: int, room: int,
) -> None:  # fmt: skip
    """As `fused_fp8.fill`."""
    rows, rank = low.shape
    _fill[(triton.cdiv(rows, 32),)](
        wide, wide_scales, tall, tall_scales, low, most, rows, rows // members, rank, inputs, room, wide.stride(0),
        tall.stride(0), low.stride(0), low.stride(1), ROWS=32, RANK=triton.next_power_of_2(rank),
        ROOM=triton.next_power_of_2(2 * room), num_warps=4,
    )  # fmt: skip


def gate(gate_up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """act(gate) * up (M, F) of (M, 2F), quantized, and its scales (M, 1)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=SMALL, device=gate_up.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=gate_up.device)
    _gate[(rows,)](gate_up, out, scales, width, SILU=silu, BLOCK=triton.next_power_of_2(width), num_warps=8)
    return out, scales


def gate_backward(gate_up: Tensor, dh: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate_up (M, 2F) quantized, its scales (M, 1), the gradient itself, and act(gate) * up, which
    takes the place of `dh`."""
    rows, width = dh.shape
    out = torch.empty_like(gate_up)
    small = torch.empty(gate_up.shape, dtype=SMALL, device=dh.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=dh.device)
    _gate_backward[(rows,)](
        gate_up, dh, out, small, scales, width, SILU=silu, BLOCK=triton.next_power_of_2(width), num_warps=16
    )
    return small, scales, out, dh


@triton.jit
def _to_small(x):
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _quantize(
    x, low, out, scales, width, rank, room, stride, low_stride, BLOCK: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, r = tl.arange(0, BLOCK), tl.arange(0, ROOM)
    value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    thin = tl.load(low + row * low_stride + r, mask=r < rank, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.maximum(tl.max(tl.abs(value), 0), tl.max(tl.abs(thin), 0)), 1e-30) / 448
    tl.store(scales + row, scale)
    to = out + row * (width + 3 * room)
    tl.store(to + column, _to_small(value * (1 / scale)), mask=column < width)
    thin = thin * (1 / scale)
    high = _to_small(thin)
    tl.store(to + width + r, high, mask=r < room)
    tl.store(to + width + room + r, _to_small(thin - high.to(tl.float32)), mask=r < room)
    tl.store(to + width + 2 * room + r, high, mask=r < room)


@triton.jit
def _fill(
    wide, wide_scales, tall, tall_scales, low, most, rows, share, rank, inputs, room, wide_stride, tall_stride,
    row_stride, rank_stride, ROWS: tl.constexpr, RANK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    row, r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    there = (row < rows)[:, None] & (r < rank)[None, :]
    value = tl.load(low + row[:, None] * row_stride + r[None, :] * rank_stride, mask=there, other=0.0).to(tl.float32)
    column = inputs + (row // share * rank)[:, None] + r[None, :]  # a member's own columns
    scaled = value / tl.load(wide_scales + row, mask=row < rows, other=1.0)[:, None]
    high = _to_small(scaled)
    to = wide + row.to(tl.int64)[:, None] * wide_stride + column
    tl.store(to, high, mask=there)
    tl.store(to + room, high, mask=there)
    tl.store(to + 2 * room, _to_small(scaled - high.to(tl.float32)), mask=there)
    scale = tl.maximum(tl.load(most).to(tl.float32), 1e-30) / 448
    scaled = value / scale
    high = _to_small(scaled)
    to = tall + column.to(tl.int64) * tall_stride + row[:, None]
    tl.store(to, high, mask=there)
    tl.store(to + room * tall_stride, _to_small(scaled - high.to(tl.float32)), mask=there)
    own = tl.arange(0, ROOM)
    tl.store(tall_scales + inputs + own, scale + 0 * own, mask=(own < 2 * room) & (tl.program_id(0) == 0))


@triton.jit
def _gate(gate_up, out, scales, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=there, other=0.0).to(tl.float32)
    act, _ = _activation(gate, SILU)
    value = act * up
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-30) / 448
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, _to_small(value * (1 / scale)), mask=there)


@triton.jit
def _gate_backward(gate_up, dh, out, small, scales, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = column < width
    first = row * 2 * width + column
    gate = tl.load(gate_up + first, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + first + width, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * width + column, mask=there, other=0.0).to(tl.float32)
    act, slope = _activation(gate, SILU)
    tl.store(dh + row * width + column, (act * up).to(dh.dtype.element_ty), mask=there)
    gate, up = grad * up * slope, grad * act
    tl.store(out + first, gate.to(out.dtype.element_ty), mask=there)
    tl.store(out + first + width, up.to(out.dtype.element_ty), mask=there)
    most = tl.maximum(tl.max(tl.abs(gate), 0), tl.max(tl.abs(up), 0))
    scale = tl.maximum(most, 1e-30) / 448
    tl.store(scales + row, scale)
    tl.store(small + first, _to_small(gate * (1 / scale)), mask=there)
    tl.store(small + first + width, _to_small(up * (1 / scale)), mask=there)
