"""Gradients of parameters that each process holds whole, or a part of (tasks.engine.distributed.fsdp)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.engine.distributed.fsdp import is_sharded, local_tensor
from tasks.engine.distributed.ranks import sum_over_ranks, world_size

BUCKET_ELEMENTS = 1 << 26  # elements summed at once: 256 MiB in float32


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients of whole parameters over all processes; split ones' backward has summed."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)]
    while grads:
        size, bucket = 0, list[Tensor]()
        while (
            grads and (not bucket or size + grads[-1].numel() <= BUCKET_ELEMENTS) and grads[-1].dtype == grads[0].dtype
        ):
            bucket.append(grads.pop())
            size += bucket[-1].numel()
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        for grad, part in zip(bucket, torch.split(flat, [grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, whole and split ones."""
    grads = [p.grad for p in parameters if p.grad is not None]
    whole = [grad for grad in grads if not is_sharded(grad)]
    parts = [local_tensor(grad) for grad in grads if is_sharded(grad)]
    norm = torch.nn.utils.get_total_norm(whole) if whole else torch.zeros((), device=grads[0].device)
    return norm_with_shards(norm, torch.nn.utils.get_total_norm(parts)) if parts else norm


def norm_with_shards(whole: Tensor, part: Tensor) -> Tensor:
    """The norm of what all processes hold together: of norm `whole` in each of them, and `part` in this one alone."""
    return (whole.square() + sum_over_ranks(part.square())).sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiplies all gradients by `factor`."""
    grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
