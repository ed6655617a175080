"""FSDP2: each layer's matrices, their gradients and optimizer state sharded over the processes (torch's `fully_shard`).

A sharded weight is a DTensor that holds this process's rows; its backward leaves their gradient, summed over all
processes. Embedding, LM head, norms, biases and fused adapters are replicated.
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

UNIT_BYTES = 1 << 28  # least weights gathered at once: a gather's host time does not depend on its size


def shard_layers(
    body: nn.Module,
    layers: Sequence[nn.Module],
    replicated: Iterable[nn.Parameter] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Shards the matrices of each layer; they are gathered for its forward and backward, small layers' in groups.

    Embedding, LM head (which the chunked loss multiplies by itself), vectors and `replicated` parameters are not
    sharded. With `dtype`, matrices are gathered in it and their gradients summed in float32.
    """
    if any(type(p).__name__ == "Params4bit" for p in body.parameters()):
        raise BadConfig("4-bit weights cannot be sharded over processes: set strategy=ddp, or method=lora")
    mesh = init_device_mesh(next(body.parameters()).device.type, (world_size(),))
    ignored = {p for p in body.parameters() if p.dim() < 2} | set(replicated)
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
    unit, size = list[nn.Module](), 0
    for layer in layers:
        unit.append(layer)
        size += sum(p.numel() * (dtype or p.dtype).itemsize for p in layer.parameters() if p not in ignored)
        if size >= UNIT_BYTES or layer is layers[-1]:
            # Resharded even after the last unit: a CUDA graph captured later would read what a validation had gathered.
            fully_shard(
                cast(Any, unit), mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=ignored
            )
            sharded_unit = cast(FSDPModule, layer)
            sharded_unit.set_gradient_divide_factor(1.0)  # gradients are summed, as in gradient_reduction
            sharded_unit.set_force_sum_reduction_for_comms(True)
            unit, size = [], 0
    sharded = {p for layer in layers for p in layer.parameters()} - ignored
    fully_shard(body, mesh=mesh, ignored_params=set(body.parameters()) - sharded)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a shard."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, sharing its memory; all of an unsharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor that may be sharded by rows, and the index of the first of them."""
    rows_per_rank = -(-len(tensor) // world_size())  # as torch.chunk cuts
    return local_tensor(tensor), rank() * rows_per_rank if is_sharded(tensor) else 0


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` sharded as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def join_shard(shard: Tensor, like: Tensor) -> Tensor:
    """A DTensor of `like`'s shape and placement whose local shard is `shard`, sharing its memory."""
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW over the local shards of parameters: one call for sharded and replicated ones together."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, fused=True)

    def _init_group(self, group: dict[str, Any], *tensor_lists: list[Tensor]) -> bool:
        has_complex: bool = cast(Any, super())._init_group(group, *tensor_lists)
        for tensors in tensor_lists:  # parameters, gradients, moments, steps
            tensors[:] = map(local_tensor, tensors)
        return has_complex
