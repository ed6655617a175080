# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Numbers as every kernel of a layer reads them: float32, 0 where there are none."""

import triton
import triton.language as tl


@triton.jit
def load(tensor, at, there):
    """In float32."""
    return tl.load(tensor + at, mask=there, other=0.0).to(tl.float32)
