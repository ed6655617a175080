"""A weight's gradient as one product, summed in a wider dtype than its factors have."""

import torch
from torch import Tensor


class Fresh:
    """Where a gradient goes when nothing there counts any more: the first product writes it. `taken` says that one
    did."""

    def __init__(self, total: Tensor) -> None:
        self.total, self.taken = total, False


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, fresh: bool = False) -> None:
    """total (N, K) += scale * a @ b, summed in the dtype of `total`; `fresh`: written, whatever is there. Float32 sums
    of half-precision products, and no copy of (N, K), where torch can."""
    wider = a.is_cuda and total.dtype == torch.float32
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale, beta=0 if fresh else 1)
    elif wider and fresh:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
        if scale != 1:
            total.mul_(scale)
    elif wider:
        torch.addmm(total, a, b, alpha=scale, out_dtype=torch.float32, out=total)
    elif fresh:
        total.copy_(scale * (a @ b))
    else:
        total += scale * (a @ b)
