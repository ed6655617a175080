# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Quantization to 8-bit floats (tasks.engine.speed.fp8.matmul), also fused with an MLP's activation, in Triton.

A program works on whole rows, whose largest absolute value gives their scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.engine.speed.fused_lora.mlp_kernel import _activation

FP8 = torch.float8_e4m3fn


def quantize_with_lora(x: Tensor, lora: Tensor, lora_columns: int) -> tuple[Tensor, Tensor]:
    """See matmul.quantize_with_lora; `lora_columns` is the padded rank R."""
    (rows, width), rank = x.shape, lora.shape[1]
    out = torch.empty((rows, width + 3 * lora_columns), dtype=FP8, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _quantize_with_lora[(rows,)](
        x, lora, out, scales, width, rank, lora_columns, x.stride(0), lora.stride(0),
        BLOCK=triton.next_power_of_2(width), LORA_BLOCK=triton.next_power_of_2(lora_columns), num_warps=4,
    )  # fmt: skip
    return out, scales


def fill_lora(
    wide: Tensor, wide_scales: Tensor, tall: Tensor, tall_scales: Tensor, lora: Tensor, members: int, largest: Tensor,
    inputs: int, lora_columns: int,
) -> None:  # fmt: skip
    """See matmul.fill_lora; `lora_columns` is the padded rank R."""
    rows, rank = lora.shape
    _fill_lora[(triton.cdiv(rows, 32),)](
        wide, wide_scales, tall, tall_scales, lora, largest, rows, rows // members, rank, inputs, lora_columns,
        wide.stride(0), tall.stride(0), lora.stride(0), lora.stride(1), ROWS=32, RANK=triton.next_power_of_2(rank),
        LORA_BLOCK=triton.next_power_of_2(2 * lora_columns), num_warps=4,
    )  # fmt: skip


def gated_activation(gate_up: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """act(gate) * up (T, F) of gate_up (T, 2F), quantized, and its rows' scales (T, 1)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=FP8, device=gate_up.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=gate_up.device)
    _gated_activation[(rows,)](gate_up, out, scales, width, SILU=silu, BLOCK=triton.next_power_of_2(width), num_warps=8)
    return out, scales


def gated_activation_backward(gate_up: Tensor, dh: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of gate_up (T, 2F) quantized, its rows' scales (T, 1), the gradient itself, and act(gate) * up.

    The latter is written into `dh`.
    """
    rows, width = dh.shape
    out = torch.empty_like(gate_up)
    quantized = torch.empty(gate_up.shape, dtype=FP8, device=dh.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=dh.device)
    _gated_activation_backward[(rows,)](
        gate_up, dh, out, quantized, scales, width, SILU=silu, BLOCK=triton.next_power_of_2(width), num_warps=16
    )
    return quantized, scales, out, dh


@triton.jit
def _to_fp8(x):
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _quantize_with_lora(
    x, lora, out, scales, width, rank, lora_columns, stride, lora_stride, BLOCK: tl.constexpr, LORA_BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, r = tl.arange(0, BLOCK), tl.arange(0, LORA_BLOCK)
    value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    lora_value = tl.load(lora + row * lora_stride + r, mask=r < rank, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.maximum(tl.max(tl.abs(value), 0), tl.max(tl.abs(lora_value), 0)), 1e-30) / 448
    tl.store(scales + row, scale)
    target = out + row * (width + 3 * lora_columns)
    tl.store(target + column, _to_fp8(value * (1 / scale)), mask=column < width)
    lora_value = lora_value * (1 / scale)
    high = _to_fp8(lora_value)
    tl.store(target + width + r, high, mask=r < lora_columns)
    tl.store(target + width + lora_columns + r, _to_fp8(lora_value - high.to(tl.float32)), mask=r < lora_columns)
    tl.store(target + width + 2 * lora_columns + r, high, mask=r < lora_columns)


@triton.jit
def _fill_lora(
    wide, wide_scales, tall, tall_scales, lora, largest, rows, member_rows, rank, inputs, lora_columns, wide_stride,
    tall_stride, row_stride, rank_stride, ROWS: tl.constexpr, RANK: tl.constexpr, LORA_BLOCK: tl.constexpr,
):  # fmt: skip
    row, r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    mask = (row < rows)[:, None] & (r < rank)[None, :]
    value = tl.load(lora + row[:, None] * row_stride + r[None, :] * rank_stride, mask=mask, other=0.0).to(tl.float32)
    column = inputs + (row // member_rows * rank)[:, None] + r[None, :]  # members have separate columns
    scaled = value / tl.load(wide_scales + row, mask=row < rows, other=1.0)[:, None]
    high = _to_fp8(scaled)
    target = wide + row.to(tl.int64)[:, None] * wide_stride + column
    tl.store(target, high, mask=mask)
    tl.store(target + lora_columns, high, mask=mask)
    tl.store(target + 2 * lora_columns, _to_fp8(scaled - high.to(tl.float32)), mask=mask)
    scale = tl.maximum(tl.load(largest).to(tl.float32), 1e-30) / 448
    scaled = value / scale
    high = _to_fp8(scaled)
    target = tall + column.to(tl.int64) * tall_stride + row[:, None]
    tl.store(target, high, mask=mask)
    tl.store(target + lora_columns * tall_stride, _to_fp8(scaled - high.to(tl.float32)), mask=mask)
    lora_column = tl.arange(0, LORA_BLOCK)
    tl.store(
        tall_scales + inputs + lora_column,
        scale + 0 * lora_column,
        mask=(lora_column < 2 * lora_columns) & (tl.program_id(0) == 0),
    )


@triton.jit
def _gated_activation(gate_up, out, scales, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activation(gate, SILU)
    value = act * up
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-30) / 448
    tl.store(scales + row, scale)
    tl.store(out + row * width + column, _to_fp8(value * (1 / scale)), mask=mask)


@triton.jit
def _gated_activation_backward(gate_up, dh, out, quantized, scales, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < width
    offset = row * 2 * width + column
    gate = tl.load(gate_up + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + offset + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dh + row * width + column, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activation(gate, SILU)
    tl.store(dh + row * width + column, (act * up).to(dh.dtype.element_ty), mask=mask)
    gate, up = grad * up * slope, grad * act
    tl.store(out + offset, gate.to(out.dtype.element_ty), mask=mask)
    tl.store(out + offset + width, up.to(out.dtype.element_ty), mask=mask)
    largest = tl.maximum(tl.max(tl.abs(gate), 0), tl.max(tl.abs(up), 0))
    scale = tl.maximum(largest, 1e-30) / 448
    tl.store(scales + row, scale)
    tl.store(quantized + offset, _to_fp8(gate * (1 / scale)), mask=mask)
    tl.store(quantized + offset + width, _to_fp8(up * (1 / scale)), mask=mask)
