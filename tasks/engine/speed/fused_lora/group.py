"""Linear layers that share one input, grouped: frozen weights and the adapters' low-precision copies."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tasks.engine.distributed.fsdp import own_rows
from tasks.engine.speed.fp8 import matmul
from tasks.engine.speed.fp8.matmul import fill, quantize_weight
from tasks.engine.speed.fused_lora.linear import empty_extended, fill_adapters, lora_linear
from tasks.engine.speed.fused_lora.nf4_dequantize import PARTS, nf4_parts

ADAPTER = "default"


class LoraGroup(nn.Module):
    """Members' outputs (..., N_i) from their common input (..., K). Holds buffers only: members keep their place.

    With `fp8` the weights are kept in 8 bits, for tasks.engine.speed.fp8.mlp_fp8 to multiply; with `split` the extended
    weight is a frozen parameter, for fsdp2 to split by rows. Peft's modules then have none left: NaN in their place.
    """

    extended: Tensor
    low_a: Tensor
    low_b: Tensor
    bias: Tensor | None

    def __init__(self, members: Sequence[LoraLayer], fp8: bool = False, split: bool = False) -> None:
        super().__init__()
        self.members = tuple(members)  # no children: their parameters have one name, peft's
        bases = [cast(nn.Linear, member.get_base_layer()) for member in members]
        self.sizes = [base.out_features for base in bases]
        self.scales = [float(member.scaling[ADAPTER]) for member in members]
        inputs, outputs, rank = bases[0].in_features, sum(self.sizes), members[0].r[ADAPTER]
        self.by_columns = inputs <= outputs
        quantized = [nf4_parts(base.weight) for base in bases]
        self.quantized, self.fp8 = quantized[0] is not None, fp8
        if fp8:
            dtype, device = bases[0].weight.dtype, bases[0].weight.device
            self._to_fp8(bases, rank * len(bases))
            extended = torch.empty(0, dtype=dtype, device=device)
        elif self.quantized:
            for i, part in enumerate(part for parts in quantized for part in parts or ()):
                self.register_buffer(f"quantized_{i}", part, persistent=False)
            dtype, device = cast(Any, bases[0].weight).quant_state.dtype, bases[0].weight.device
            extended = torch.empty(0, dtype=dtype, device=device)
        else:
            dtype, device = bases[0].weight.dtype, bases[0].weight.device
            extended = empty_extended(outputs, inputs, rank, len(bases), self.by_columns, dtype, device)
            start = 0
            for base in bases:
                place = extended[start : start + base.out_features, :inputs]
                place.copy_(base.weight.data)
                base.weight.data = place
                start += base.out_features
        if split:
            self.extended = nn.Parameter(extended, requires_grad=False)
            _forget(bases)
        else:
            self.register_buffer("extended", extended, persistent=False)
        shape = (rank * len(bases), inputs)
        self.register_buffer("low_a", torch.empty(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("low_b", torch.empty((outputs, rank), dtype=dtype, device=device), persistent=False)
        biases = [base.bias for base in bases]
        stacked = None
        if any(bias is not None for bias in biases):
            zeros = [torch.zeros(size, dtype=dtype, device=device) for size in self.sizes]
            stacked = torch.cat([z if bias is None else bias.data for bias, z in zip(biases, zeros, strict=True)])
        self.register_buffer("bias", stacked, persistent=False)

    def _to_fp8(self, bases: list[nn.Linear], rank: int) -> None:
        """Quantizes the stacked weights once and lets go of the dense ones."""
        weight = torch.cat([base.weight.data for base in bases])
        for i, part in enumerate(quantize_weight(weight if self.by_columns else weight.t(), rank)):
            self.register_buffer(f"small_{i}", part, persistent=False)
        _forget(bases)

    def weights(self) -> list[Tensor]:
        """What an MLP as one operation multiplies: the extended weight and its NF4 parts, or the parts in 8 bits."""
        return self.in_8_bits() if self.fp8 else [self.extended, *self.quantized_parts()]

    def in_8_bits(self) -> list[Tensor]:
        """wide and tall of tasks.engine.speed.fp8.matmul with their scales: of the weight, or its transpose where
        the low
        rank is A's."""
        return [getattr(self, f"small_{i}") for i in range(matmul.PARTS)]

    def adapters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Members' A (r, K) and B (N_i, r)."""
        return (
            [cast(Any, member).lora_A[ADAPTER].weight for member in self.members],
            [cast(Any, member).lora_B[ADAPTER].weight for member in self.members],
        )

    def quantized_parts(self) -> list[Tensor]:
        """Members' NF4 tensors, one behind the other; none for a dense base."""
        return [getattr(self, f"quantized_{i}") for i in range(PARTS * len(self.sizes))] if self.quantized else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output a member, in the base's dtype."""
        a, b = self.adapters()
        parts = self.quantized_parts()
        flat = x.flatten(0, -2).to(self.low_a.dtype)
        y, _ = lora_linear(flat, self.extended, parts, self.low_a, self.low_b, a, b, self.sizes, self.scales)
        if self.bias is not None:
            y = y + self.bias
        y = y.unflatten(0, x.shape[:-1])
        return y.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (y,)


@torch.no_grad()
def refresh(groups: Iterable[LoraGroup]) -> None:
    """Takes peft's adapters into the groups' own dtype: before a forward, whenever an optimizer may have moved them."""
    groups = list(groups)
    if not groups:
        return
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for group in groups:
        a, b = group.adapters()
        targets += [
            *group.low_a.split_with_sizes([len(part) for part in a]),
            *group.low_b.split_with_sizes(group.sizes),
        ]
        sources += [*a, *torch._foreach_mul(list(b), group.scales)]
    torch._foreach_copy_(targets, sources)
    small = [group for group in groups if group.fp8]
    lows = [group.low_b if group.by_columns else group.low_a.t() for group in small]
    for group, low, most in zip(small, lows, torch._foreach_norm(lows, torch.inf) if lows else [], strict=True):
        fill(group.in_8_bits(), low, len(group.members) if group.by_columns else 1, most)
    for group in groups:
        if not (group.quantized or group.fp8):
            own, start = own_rows(group.extended)
            fill_adapters(own, group.low_a, group.low_b, group.sizes, group.by_columns, start)


def _forget(bases: Sequence[nn.Linear]) -> None:
    """Leaves NaN in a weight's place, which takes no memory: whoever multiplied it would see."""
    nothing = bases[0].weight.new_full((), torch.nan)
    for base in bases:
        base.weight.data = nothing.expand(base.weight.shape)
