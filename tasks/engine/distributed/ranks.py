"""Several processes of one host that train one model, one a GPU: started by torchrun, one process when they are not.

Trainer and accelerate run in each process as if it were alone. Three things are shared: the rows of
a step are split, gradients (tasks.engine.distributed.gradient_reduction) and numbers are summed over all processes
before the optimizer
sees them, and what a checkpoint holds is put together whole, for process 0 to write. So losses and checkpoints are one
process's, whatever the number. With `fsdp2` the layers' weights are split as well (tasks.engine.distributed.fsdp).
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tasks.core.errors import BadConfig

Strategy = Literal["ddp", "fsdp2"]
TIMEOUT = timedelta(days=1)  # with process 0, which may ask a teacher first; who hangs is the parent's to find out


def init_processes() -> None:
    """Meets the other processes that torchrun or `accelerate launch` started; does nothing without them.

    Their environment is taken away afterwards, or accelerate would wrap the model and split the rows once more.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        wanted, device = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and torch.version.cuda and Path("/dev/nvidia0").exists():  # the others may have a card
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise BadConfig(f"processes={wanted}, and there is no GPU {seen}: set processes to the number of GPUs")
        if device == "cuda":
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # Megatron-LM asks it of expandable segments
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=torch.device("cuda", 0))  # the card it sees
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        if dist.get_world_size() != wanted:
            raise BadConfig(f"{dist.get_world_size()} processes met, {wanted} were started")
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in [name for name in os.environ if name in ours or name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def end_processes() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows_of_rank(rows: Sequence[int], batch_size: int) -> list[int]:
    """This process's rows of every step: every `count`th of `batch_size` rows sorted by length, so that all work."""
    if batch_size % world_size():
        raise BadConfig(f"batch_size={batch_size} cannot be split over {world_size()} processes; make it a multiple")
    return [
        row
        for start in range(0, len(rows), batch_size)
        for row in rows[start : start + batch_size][rank() :: world_size()]
    ]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """What process 0 says."""
    if world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def barrier() -> None:
    """Until all are here."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Process 0 does it, then all others, who find what it wrote."""
    if rank():
        barrier()
    yield
    if rank() == 0:
        barrier()


def all_gather(value: Any) -> list[Any]:
    """What every process has, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found
