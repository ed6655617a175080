# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Dequantizes bitsandbytes' NF4 weights (with double quantization) into a part of a larger matrix.

Two values a byte, the first in its upper half; 64 values share a scale, which is itself 8 bits of a table of 256, with
a float32 scale for 256 of them and one offset (Dettmers et al., arXiv 2305.14314).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

PARTS = 6  # tensors of a weight, see nf4_parts
VALUES, SCALES = 64, 256  # values per scale, scales per second-level scale


def nf4_parts(weight: Tensor) -> tuple[Tensor, ...] | None:
    """The six tensors of a Params4bit weight: values, scales, value table, second-level scales, scale table, offset.

    None for a weight that is not NF4 with double quantization in bitsandbytes' default blocks.
    """
    state = cast(Any, getattr(weight, "quant_state", None))
    if state is None or getattr(state, "packing_format_for_cpu", False) or not state.nested:
        return None
    if state.quant_type != "nf4" or state.blocksize != VALUES or state.state2.blocksize != SCALES:
        return None
    return weight.data, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset


def dequantize_nf4(parts: Sequence[Tensor], out: Tensor) -> None:
    """Dequantizes a weight into `out` (N, K), which may have a row stride above K."""
    values, scales, table, scale_scales, scales_table, offset = parts
    if out.is_cuda:
        _launch_kernel(values, scales, table, scale_scales, scales_table, offset, out)
        return
    nibbles = torch.stack([values.flatten() >> 4, values.flatten() & 15], -1).flatten()
    scale_scales = scale_scales.repeat_interleave(SCALES)[: len(scales)]
    scale = scales_table[scales.long()] * scale_scales + offset
    out.copy_((table[nibbles.long()].view(-1, VALUES) * scale[:, None]).view(out.shape))


def _launch_kernel(
    values: Tensor,
    scales: Tensor,
    table: Tensor,
    scale_scales: Tensor,
    scales_table: Tensor,
    offset: Tensor,
    out: Tensor,
) -> None:
    from tasks.engine.speed.fused_lora.nf4_kernel import BLOCK, dequantize_kernel  # noqa: PLC0415  # Triton is where CUDA is

    total = out.numel()
    dequantize_kernel[(-(-total // BLOCK),)](
        values, scales, table, scale_scales, scales_table, offset, out, out.shape[1], out.stride(0), total, BLOCK=BLOCK
    )
