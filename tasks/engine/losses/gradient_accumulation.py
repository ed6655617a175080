"""Matrix products that accumulate a weight's gradient, in a wider dtype than their factors have."""

import torch
from torch import Tensor


class OverwriteBuffer:
    """Gradient buffer that the first product overwrites instead of accumulating into; `written` says that one did."""

    def __init__(self, grad: Tensor) -> None:
        self.grad, self.written = grad, False


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, overwrite: bool = False) -> None:
    """total (N, K) += scale * a @ b of a (N, M) and b (M, K), or with `overwrite` total = scale * a @ b.

    Summed in the dtype of `total`: on CUDA float32 sums of half-precision products, without a copy of (N, K).
    """
    wider = a.is_cuda and total.dtype == torch.float32
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale, beta=0 if overwrite else 1)
    elif wider and overwrite:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
        if scale != 1:
            total.mul_(scale)
    elif wider:
        torch.addmm(total, a, b, alpha=scale, out_dtype=torch.float32, out=total)
    elif overwrite:
        total.copy_(scale * (a @ b))
    else:
        total += scale * (a @ b)
