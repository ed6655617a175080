"""A weight's gradient as one product, summed in a wider dtype than its factors have."""

import torch
from torch import Tensor


def add_product(total: Tensor, grad: Tensor, x: Tensor, fresh: bool = False) -> None:
    """total (N, K) += grad.T @ x, summed in the dtype of `total`; `fresh`: written, whatever is there. No copy of
    (N, K) where torch can do without."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, x, beta=0 if fresh else 1)
    elif grad.is_cuda and total.dtype == torch.float32:
        if fresh:
            torch.mm(grad.T, x, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, grad.T, x, out_dtype=torch.float32, out=total)
    elif fresh:
        total.copy_(grad.T @ x)
    else:
        total += grad.T @ x
