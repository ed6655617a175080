# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Masked load in float32, as all kernels of a layer read their tensors."""

import triton
import triton.language as tl


@triton.jit
def load_float32(tensor, offsets, mask):
    """Values in float32, 0 where the mask is off."""
    return tl.load(tensor + offsets, mask=mask, other=0.0).to(tl.float32)
