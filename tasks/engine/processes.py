"""Several processes of one host that train one model, one a GPU: started by torchrun, one process when they are not.

Trainer and accelerate run in each process as if it were alone. Three things are shared, and all are here: the rows of
a step are split, gradients and numbers are summed over all processes before the optimizer sees them, and what a
checkpoint holds is put together whole, for process 0 to write. So losses and checkpoints are one process's, whatever
the number. With `fsdp2` each layer's weights, gradients and optimizer state are split as well.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks.core.errors import BadConfig

Strategy = Literal["ddp", "fsdp2"]
BUCKET = 1 << 26  # elements summed at once: 256 MiB in float32
UNIT = 1 << 28  # bytes of weights put together at once: what that takes of the host's time does not depend on them
PATIENCE = timedelta(days=1)  # with process 0, which may ask a teacher first; who hangs is the parent's to find out


def join() -> None:
    """Meets the other processes that torchrun or `accelerate launch` started; does nothing without them.

    Their environment is taken away afterwards, or accelerate would wrap the model and split the rows once more.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        wanted, device = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            dist.init_process_group("nccl", timeout=PATIENCE, device_id=torch.device("cuda", 0))  # the card it sees
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
        if dist.get_world_size() != wanted:
            raise BadConfig(f"{dist.get_world_size()} processes met, {wanted} were started")
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in [name for name in os.environ if name in ours or name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows: Sequence[int], batch_size: int) -> list[int]:
    """This process's rows of every step: every `count`th of `batch_size` rows sorted by length, so that all work."""
    if batch_size % count():
        raise BadConfig(f"batch_size={batch_size} cannot be split over {count()} processes; make it a multiple")
    return [
        row for start in range(0, len(rows), batch_size) for row in rows[start : start + batch_size][rank() :: count()]
    ]


def total(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def agree(value: Any) -> Any:
    """What process 0 says."""
    if count() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        dist.barrier()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 does it, then all others, who find what it wrote."""
    if rank():
        wait()
    yield
    if rank() == 0:
        wait()


def sum_gradients(parameters: Iterable[nn.Parameter], factor: float = 1.0) -> None:
    """Sums the gradients of whole parameters over all processes, times `factor`; split ones' backward has summed."""
    if count() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    while grads:
        size, bucket = 0, list[Tensor]()
        while grads and (not bucket or size + grads[-1].numel() <= BUCKET) and grads[-1].dtype == grads[0].dtype:
            bucket.append(grads.pop())
            size += bucket[-1].numel()
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat)
        flat *= factor
        for grad, part in zip(bucket, torch.split(flat, [grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, whole and split ones."""
    grads = [p.grad for p in parameters if p.grad is not None]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    parts = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    norm = torch.nn.utils.get_total_norm(whole) if whole else torch.zeros((), device=grads[0].device)
    if parts:
        square = total(torch.nn.utils.get_total_norm(parts).square())
        norm = (norm.square() + square).sqrt()
    return norm


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiplies all gradients by `factor`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if local:
        torch._foreach_mul_(local, factor)


def split_layers(body: nn.Module, layers: Sequence[nn.Module], kept: Sequence[nn.Parameter] = ()) -> None:
    """FSDP2: the weights of each layer are split over the processes and whole only while it works, small layers' with
    their neighbours'.

    Embedding, head, last norm and `kept` stay whole everywhere: the chunked loss takes the head's weight by itself.
    """
    if any(type(p).__name__ == "Params4bit" for p in body.parameters()):
        raise BadConfig("4-bit weights cannot be split over processes: set strategy=ddp, or method=lora")
    mesh, whole_ones = init_device_mesh(next(body.parameters()).device.type, (count(),)), {id(p) for p in kept}
    unit, size = list[nn.Module](), 0
    for layer in layers:
        unit.append(layer)
        size += sum(p.numel() * p.element_size() for p in layer.parameters() if id(p) not in whole_ones)
        if size >= UNIT or layer is layers[-1]:
            fully_shard(cast(Any, unit), mesh=mesh, ignored_params=set(kept))
            unit, size = [], 0
    inside = {id(p) for layer in layers for p in layer.parameters()} - whole_ones
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if id(p) not in inside})


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor that may be split by rows, and the number of the first of them."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    return tensor.to_local(), rank() * -(-len(tensor) // count())  # as torch.chunk cuts


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of `value`, split as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def all_of(value: Any) -> list[Any]:
    """What every process has, in their order."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found
