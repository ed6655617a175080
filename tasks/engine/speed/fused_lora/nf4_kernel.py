# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""`tasks.engine.speed.fused_lora.nf4_dequantize.read_nf4` as a Triton kernel."""

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def dequantize(values, scales, table, coarse, scales_table, offset, out, columns, stride, total, BLOCK: tl.constexpr):
    """`total` values of a matrix with `columns` an even number of them a row, rows `stride` apart in `out`."""
    byte = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    there = 2 * byte < total
    packed = tl.load(values + byte, mask=there, other=0).to(tl.int32)
    block = byte // 32
    index = tl.load(scales + block, mask=there, other=0).to(tl.int32)
    scale = tl.load(scales_table + index) * tl.load(coarse + block // 256, mask=there, other=0.0) + tl.load(offset)
    first, second = tl.load(table + (packed >> 4)) * scale, tl.load(table + (packed & 15)) * scale
    both = tl.interleave(first, second)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // columns, at % columns
    tl.store(out + row.to(tl.int64) * stride + column, both.to(out.dtype.element_ty), mask=at < total)
