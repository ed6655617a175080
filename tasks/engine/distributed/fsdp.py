"""FSDP2: a layer's matrices, their gradients and optimizer state split over the processes (torch's `fully_shard`).

A weight that is split is a DTensor and holds this process's part; its backward leaves the part of its gradient, summed
over all processes. Embedding, head, norms, biases and fused adapters stay whole everywhere.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks.core.errors import BadConfig
from tasks.engine.distributed.ranks import rank, world_size

UNIT_BYTES = (
    1 << 28
)  # bytes of weights put together at once: what that takes of the host's time does not depend on them


def shard_layers(
    body: nn.Module, layers: Sequence[nn.Module], kept: Iterable[nn.Parameter] = (), dtype: torch.dtype | None = None
) -> None:
    """The matrices of each layer are split and whole only while it works, small layers' with their neighbours'.

    Embedding, head, vectors and `kept` are not: the chunked loss takes the head's weight by itself. With `dtype`
    matrices are put together in it, and their gradients summed in float32.
    """
    if any(type(p).__name__ == "Params4bit" for p in body.parameters()):
        raise BadConfig("4-bit weights cannot be split over processes: set strategy=ddp, or method=lora")
    mesh = init_device_mesh(next(body.parameters()).device.type, (world_size(),))
    kept = {p for p in body.parameters() if p.dim() < 2} | set(kept)
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
    unit, size = list[nn.Module](), 0
    for layer in layers:
        unit.append(layer)
        size += sum(p.numel() * (dtype or p.dtype).itemsize for p in layer.parameters() if p not in kept)
        if size >= UNIT_BYTES or layer is layers[-1]:
            # The last ones too: what a validation left whole, a graph captured next would read when it is long freed.
            fully_shard(cast(Any, unit), mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=kept)
            of_unit = cast(FSDPModule, layer)
            of_unit.set_gradient_divide_factor(1.0)  # a sum, as everywhere
            of_unit.set_force_sum_reduction_for_comms(True)
            unit, size = [], 0
    inside = {p for layer in layers for p in layer.parameters()} - kept
    fully_shard(body, mesh=mesh, ignored_params=set(body.parameters()) - inside)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; changes are made there."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor that may be split by rows, and the number of the first of them."""
    return local_tensor(tensor), rank() * -(-len(tensor) // world_size()) if is_sharded(
        tensor
    ) else 0  # as torch.chunk cuts


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of `value`, split as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def join_shard(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of `like`'s shape of which this process holds `part`, in its place."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class AdamW(torch.optim.AdamW):
    """torch's, fused, over what this process holds of each parameter: whole and split ones torch takes one by one."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, fused=True)

    def _init_group(self, group: dict[str, Any], *found: list[Tensor]) -> bool:
        has_complex: bool = cast(Any, super())._init_group(group, *found)
        for tensors in found:  # parameters, gradients, moments, steps
            tensors[:] = map(local_tensor, tensors)
        return has_complex
