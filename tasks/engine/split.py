"""FSDP2: a layer's weights, their gradients and optimizer state split over the processes (torch's `fully_shard`).

A weight that is split is a DTensor and holds this process's part; its backward leaves the part of its gradient, summed
over all processes. Embedding, head, last norm and fused adapters stay whole everywhere.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks.core.errors import BadConfig
from tasks.engine.processes import count, rank

UNIT = 1 << 28  # bytes of weights put together at once: what that takes of the host's time does not depend on them


def split_layers(body: nn.Module, layers: Sequence[nn.Module], kept: Sequence[nn.Parameter] = ()) -> None:
    """The weights of each layer are split and whole only while it works, small layers' with their neighbours'.

    Embedding, head, last norm and `kept` are not: the chunked loss takes the head's weight by itself.
    """
    if any(type(p).__name__ == "Params4bit" for p in body.parameters()):
        raise BadConfig("4-bit weights cannot be split over processes: set strategy=ddp, or method=lora")
    mesh, whole_ones = init_device_mesh(next(body.parameters()).device.type, (count(),)), {id(p) for p in kept}
    unit, size = list[nn.Module](), 0
    for layer in layers:
        unit.append(layer)
        size += sum(p.numel() * p.element_size() for p in layer.parameters() if id(p) not in whole_ones)
        if size >= UNIT or layer is layers[-1]:
            # The last ones too: what a validation left whole, a graph captured next would read when it is long freed.
            fully_shard(cast(Any, unit), mesh=mesh, reshard_after_forward=True, ignored_params=set(kept))
            of_unit = cast(FSDPModule, layer)
            of_unit.set_gradient_divide_factor(1.0)  # a sum, as everywhere
            of_unit.set_force_sum_reduction_for_comms(True)
            unit, size = [], 0
    inside = {id(p) for layer in layers for p in layer.parameters()} - whole_ones
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if id(p) not in inside})


def is_split(tensor: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; changes are made there."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor that may be split by rows, and the number of the first of them."""
    return own(tensor), rank() * -(-len(tensor) // count()) if is_split(tensor) else 0  # as torch.chunk cuts


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of `value`, split as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def joined_like(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of `like`'s shape of which this process holds `part`, in its place."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
