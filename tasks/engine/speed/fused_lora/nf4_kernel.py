# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""NF4 dequantization as a Triton kernel (tasks.engine.speed.fused_lora.nf4_dequantize)."""

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def dequantize_kernel(
    values, scales, table, scale_scales, scales_table, offset, out, columns, stride, total, BLOCK: tl.constexpr
):
    """Writes a matrix of `total` values, an even number of `columns` in a row, with a row stride of `stride`."""
    byte = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    mask = 2 * byte < total
    byte_value = tl.load(values + byte, mask=mask, other=0).to(tl.int32)
    block = byte // 32
    index = tl.load(scales + block, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales_table + index) * tl.load(scale_scales + block // 256, mask=mask, other=0.0) + tl.load(offset)
    first, second = tl.load(table + (byte_value >> 4)) * scale, tl.load(table + (byte_value & 15)) * scale
    pair = tl.interleave(first, second)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = position // columns, position % columns
    tl.store(out + row.to(tl.int64) * stride + column, pair.to(out.dtype.element_ty), mask=position < total)
