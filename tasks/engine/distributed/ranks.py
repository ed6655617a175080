"""Ranks of the processes that train one model on one host, one a GPU, and their collectives.

The training loop runs in each process. A step's rows are divided among them; gradients
(tasks.engine.distributed.gradient_reduction) and metrics are summed before the optimizer step; a checkpoint is gathered
for process 0 to write. So losses and checkpoints do not depend on the number of processes. With `fsdp2` the layers'
weights are sharded as well (tasks.engine.distributed.fsdp).
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
TIMEOUT = timedelta(days=1)  # process 0 may run a teacher first; a hanging process is noticed by its parent
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def init_processes() -> None:
    """Joins the process group that torchrun or `accelerate launch` describe in the environment; none without them.

    Their variables are removed afterwards, or transformers and accelerate would distribute the model once more.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        expected, device = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and torch.version.cuda and Path("/dev/nvidia0").exists():  # the others may have a card
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise BadConfig(f"processes={expected}, and there is no GPU {visible}: set processes to the number of GPUs")
        if device == "cuda":
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")  # Megatron-LM asks it of expandable segments
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=torch.device("cuda", 0))  # the card it sees
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        if dist.get_world_size() != expected:
            raise BadConfig(f"{dist.get_world_size()} processes met, {expected} were started")
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[name]


def end_processes() -> None:
    """Leaves the process group of `init_processes`."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; process 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rows_of_rank(rows: Sequence[int], batch_size: int) -> list[int]:
    """This process's rows of every step: every `world_size`-th of `batch_size` rows sorted by length: equal work."""
    if batch_size % world_size():
        raise BadConfig(f"batch_size={batch_size} cannot be divided among {world_size()} processes; make it a multiple")
    return [
        row
        for start in range(0, len(rows), batch_size)
        for row in rows[start : start + batch_size][rank() :: world_size()]
    ]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Process 0's value, in every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Process 0 runs the block, then all others, who find the files that it wrote."""
    if rank():
        barrier()
    yield
    if rank() == 0:
        barrier()


def all_gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
