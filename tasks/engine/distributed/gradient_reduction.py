"""Sums, norm and scale of gradients over processes, of replicated and of sharded parameters."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.engine.distributed.fsdp import is_sharded, local_tensor
from tasks.engine.distributed.ranks import sum_over_ranks, world_size

BUCKET_ELEMENTS = 1 << 26  # elements of an all-reduce: 256 MiB in float32


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients of replicated parameters over all processes; sharded ones are summed in the backward."""
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
    """Norm of all gradients together, of replicated and sharded parameters."""
    grads = [p.grad for p in parameters if p.grad is not None]
    replicated = [grad for grad in grads if not is_sharded(grad)]
    shards = [local_tensor(grad) for grad in grads if is_sharded(grad)]
    norm = torch.nn.utils.get_total_norm(replicated) if replicated else torch.zeros((), device=grads[0].device)
    return norm_with_shards(norm, torch.nn.utils.get_total_norm(shards)) if shards else norm


def norm_with_shards(replicated: Tensor, shards: Tensor) -> Tensor:
    """Norm over all processes, from the norm of what is replicated and the norm of this process's shards."""
    return (replicated.square() + sum_over_ranks(shards.square())).sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiplies all gradients by `factor`."""
    grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
