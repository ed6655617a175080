"""Groups of LoRA layers with one input: their frozen weights stacked, their adapters copied to the base's dtype."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tasks.engine.distributed.fsdp import local_rows
from tasks.engine.speed.fp8 import matmul
from tasks.engine.speed.fp8.matmul import fill_lora, quantize_weight
from tasks.engine.speed.fused_lora.linear import empty_extended, fill_adapters, lora_linear
from tasks.engine.speed.fused_lora.nf4_dequantize import PARTS, nf4_parts

ADAPTER = "default"


class LoraGroup(nn.Module):
    """Computes members' outputs (..., N_i) from their common input (..., K); members stay peft's modules.

    With `fp8` the frozen weights are in 8 bits, for tasks.engine.speed.fp8.mlp_fp8; with `sharded` they are a parameter
    that FSDP2 shards by rows. Peft's base layers then hold NaN instead of a weight.
    """

    extended: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None

    def __init__(self, members: Sequence[LoraLayer], fp8: bool = False, sharded: bool = False) -> None:
        super().__init__()
        self.members = tuple(members)  # a tuple, not children: their parameters are registered under peft's names alone
        bases = [cast(nn.Linear, member.get_base_layer()) for member in members]
        self.sizes = [base.out_features for base in bases]
        self.scales = [float(member.scaling[ADAPTER]) for member in members]
        inputs, outputs, rank = bases[0].in_features, sum(self.sizes), members[0].r[ADAPTER]
        self.by_columns = inputs <= outputs
        quantized = [nf4_parts(base.weight) for base in bases]
        self.quantized, self.fp8 = quantized[0] is not None, fp8
        if fp8:
            dtype, device = bases[0].weight.dtype, bases[0].weight.device
            self._quantize_to_fp8(bases, rank * len(bases))
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
                weight = extended[start : start + base.out_features, :inputs]
                weight.copy_(base.weight.data)
                base.weight.data = weight
                start += base.out_features
        if sharded:
            self.extended = nn.Parameter(extended, requires_grad=False)
            _release_weights(bases)
        else:
            self.register_buffer("extended", extended, persistent=False)
        shape = (rank * len(bases), inputs)
        self.register_buffer("lora_a", torch.empty(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("lora_b", torch.empty((outputs, rank), dtype=dtype, device=device), persistent=False)
        biases = [base.bias for base in bases]
        stacked_bias = None
        if any(bias is not None for bias in biases):
            zeros = [torch.zeros(size, dtype=dtype, device=device) for size in self.sizes]
            stacked_bias = torch.cat([z if bias is None else bias.data for bias, z in zip(biases, zeros, strict=True)])
        self.register_buffer("bias", stacked_bias, persistent=False)

    def _quantize_to_fp8(self, bases: list[nn.Linear], rank: int) -> None:
        """Quantizes the stacked weights and frees the dense ones."""
        weight = torch.cat([base.weight.data for base in bases])
        for i, part in enumerate(quantize_weight(weight if self.by_columns else weight.t(), rank)):
            self.register_buffer(f"fp8_{i}", part, persistent=False)
        _release_weights(bases)

    def weights(self) -> list[Tensor]:
        """Weights for tasks.engine.speed.fused_lora.mlp: the extended weight and NF4 parts, or the parts in 8 bits."""
        return self.fp8_weights() if self.fp8 else [self.extended, *self.quantized_parts()]

    def fp8_weights(self) -> list[Tensor]:
        """`wide` and `tall` of tasks.engine.speed.fp8.matmul with their scales.

        Of the weight W with the LoRA matrix sB, or of its transpose with A', by `by_columns`.
        """
        return [getattr(self, f"fp8_{i}") for i in range(matmul.PARTS)]

    def adapters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Peft's parameters A (r, K) and B (N_i, r) of each member."""
        return (
            [cast(Any, member).lora_A[ADAPTER].weight for member in self.members],
            [cast(Any, member).lora_B[ADAPTER].weight for member in self.members],
        )

    def quantized_parts(self) -> list[Tensor]:
        """NF4 tensors of all members in order (tasks.engine.speed.fused_lora.nf4_dequantize); none for a dense base."""
        return [getattr(self, f"quantized_{i}") for i in range(PARTS * len(self.sizes))] if self.quantized else []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (..., K) -> one output (..., N_i) per member, in the base's dtype."""
        a, b = self.adapters()
        parts = self.quantized_parts()
        flat = x.flatten(0, -2).to(self.lora_a.dtype)
        y, _ = lora_linear(flat, self.extended, parts, self.lora_a, self.lora_b, a, b, self.sizes, self.scales)
        if self.bias is not None:
            y = y + self.bias
        y = y.unflatten(0, x.shape[:-1])
        return y.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (y,)


@torch.no_grad()
def refresh_adapters(groups: Iterable[LoraGroup]) -> None:
    """Copies peft's adapters into the groups' dtype, before each forward: an optimizer may have changed them."""
    groups = list(groups)
    if not groups:
        return
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    for group in groups:
        a, b = group.adapters()
        targets += [
            *group.lora_a.split_with_sizes([len(part) for part in a]),
            *group.lora_b.split_with_sizes(group.sizes),
        ]
        sources += [*a, *torch._foreach_mul(list(b), group.scales)]
    torch._foreach_copy_(targets, sources)
    fp8_groups = [group for group in groups if group.fp8]
    matrices = [group.lora_b if group.by_columns else group.lora_a.t() for group in fp8_groups]
    for group, matrix, largest in zip(
        fp8_groups, matrices, torch._foreach_norm(matrices, torch.inf) if matrices else [], strict=True
    ):
        fill_lora(group.fp8_weights(), matrix, len(group.members) if group.by_columns else 1, largest)
    for group in groups:
        if not (group.quantized or group.fp8):
            rows, first_row = local_rows(group.extended)
            fill_adapters(rows, group.lora_a, group.lora_b, group.sizes, group.by_columns, first_row)


def _release_weights(bases: Sequence[nn.Linear]) -> None:
    """Frees base weights, leaving NaN of their shape without memory, so that a product with one would show."""
    nan = bases[0].weight.new_full((), torch.nan)
    for base in bases:
        base.weight.data = nan.expand(base.weight.shape)
