# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""bitsandbytes' NF4 weights (double quantization) read into a part of a larger matrix.

Two values a byte, the first in its upper half; 64 values share a scale, which is itself 8 bits of a table of 256, with
a float32 scale for 256 of them and one offset (Dettmers et al., arXiv 2305.14314).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

PARTS = 6  # tensors that make up a weight
VALUES, SCALES = 64, 256  # values that share a scale, scales that share theirs


def nf4_parts(weight: Tensor) -> tuple[Tensor, ...] | None:
    """The six tensors of a Params4bit weight: values, scales, table of values, scales' scales, table of scales, offset.

    None for what is no NF4 weight with double quantization in bitsandbytes' usual blocks.
    """
    state = cast(Any, getattr(weight, "quant_state", None))
    if state is None or getattr(state, "packing_format_for_cpu", False) or not state.nested:
        return None
    if state.quant_type != "nf4" or state.blocksize != VALUES or state.state2.blocksize != SCALES:
        return None
    return weight.data, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset


def read_nf4(parts: Sequence[Tensor], out: Tensor) -> None:
    """Writes the weight into `out` (N, K), whose rows may lie apart."""
    values, scales, table, scales_scales, scales_table, offset = parts
    if out.is_cuda:
        _launch(values, scales, table, scales_scales, scales_table, offset, out)
        return
    halves = torch.stack([values.flatten() >> 4, values.flatten() & 15], -1).flatten()
    coarse = scales_scales.repeat_interleave(SCALES)[: len(scales)]
    scale = scales_table[scales.long()] * coarse + offset
    out.copy_((table[halves.long()].view(-1, VALUES) * scale[:, None]).view(out.shape))


def _launch(
    values: Tensor, scales: Tensor, table: Tensor, coarse: Tensor, scales_table: Tensor, offset: Tensor, out: Tensor
) -> None:
    from tasks.engine.speed.fused_lora.nf4_kernel import BLOCK, dequantize  # noqa: PLC0415  # Triton is where CUDA is

    total = out.numel()
    dequantize[(-(-total // BLOCK),)](
        values, scales, table, coarse, scales_table, offset, out, out.shape[1], out.stride(0), total, BLOCK=BLOCK
    )
