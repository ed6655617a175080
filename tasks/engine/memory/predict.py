"""Predicts the peak memory of a training run before anything is loaded.

    parts = predict(sizes_of(base, config, "qlora"), workload_of(config, "qlora", tokens=8192))
    parts.peak, parts.card

A peak is weights + optimizer state + the larger of two moments: the end of the forward, when every layer's activations
wait for the backward, and the end of the backward, when every gradient exists. Sizes are counted on torch's meta
device (tasks.engine.memory.model_sizes); what a layer saves a token is in tasks.engine.memory.activations.
`tests/benchmarks/memory.py` compares it with a GPU.
"""

from typing import NamedTuple

from tasks.engine.memory.activations import activations
from tasks.engine.memory.model_sizes import ModelSizes
from tasks.engine.memory.workload import Workload

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes an element: a code, its block's scale in 8 bits, that one's scale in 32
OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0.0}  # bytes a trained element; paged: host
CONTEXT_GIB = 0.6  # CUDA's context and libraries' workspaces, beside what torch allocates
SPARE = 0.04  # of the card, for fragmentation


class MemoryParts(NamedTuple):
    """GiB of each part at the peak."""

    weights: float
    trained: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    logits: float
    extra: float = 0.0

    @property
    def peak(self) -> float:
        """The most that torch will have allocated."""
        return sum(self)

    @property
    def card(self) -> float:
        """The memory that the card must have."""
        return (self.peak + CONTEXT_GIB) / (1 - SPARE)

    def table(self) -> dict[str, float]:
        """Each part by name, with the sums; `extra` only where there is any."""
        parts = {name: value for name, value in self._asdict().items() if value or name != "extra"}
        return {**parts, "peak": self.peak, "card": self.card}


def predict(sizes: ModelSizes, work: Workload) -> MemoryParts:
    """The peak of a training step, part by part."""
    half = 4 if work.precision == "float32" else 2
    return _full_training(sizes, work, half) if work.method == "full" else _adapters(sizes, work, half)


def _adapters(sizes: ModelSizes, work: Workload, half: int) -> MemoryParts:
    """Frozen weights; the adapters, their copies in the products' dtype and their gradients."""
    saved, working = activations(sizes, work, half)
    four_bit = work.method == "qlora"
    weights = sizes.quantizable * (NF4 if four_bit else half) + sizes.unquantizable * half
    fused = work.fused_mlp and sizes.mlp_adapted
    dense = four_bit * half * (1.6 * 3 * sizes.ffn * sizes.hidden if fused else 2 * sizes.largest)
    if work.dora:  # for a matrix's norms peft multiplies its adapter by the identity, and adds it to the weight
        widest = sizes.ffn if sizes.mlp_adapted else sizes.hidden
        dense += (4 + half) * widest**2 + 2 * half * sizes.largest
    copies = half * sizes.trainable * (1.0 if four_bit else 2.0) if work.fused_mlp else 0.0  # dense weights need two
    working = max(working + dense, _logits(sizes, work, half))
    size = 4.0 * sizes.trainable
    optimizer = OPTIMIZER[work.optimizer] * sizes.trainable
    return _parts(weights, size + copies, optimizer, size, saved, working, 0.0, work.extra)


def _full_training(sizes: ModelSizes, work: Workload, half: int) -> MemoryParts:
    """Every weight in float32, and its copy in the products' dtype; gradients in float32."""
    saved, working = activations(sizes, work, half)
    logits = _logits(sizes, work, half)
    weights, gradients = 4.0 * (sizes.quantizable + sizes.unquantizable), 4.0 * sizes.trainable
    state = OPTIMIZER[work.optimizer]
    optimizer = state * (sizes.trainable - sizes.embedding) + (8.0 if state else 0.0) * sizes.embedding
    copies = half * (sizes.trainable - sizes.embedding) * (half == 2)  # autocast's, which the backward needs
    if work.cuda_graphs:
        copies += half * sizes.head * (half == 2)
        working = max(working, logits)
        return _parts(weights, copies, optimizer, gradients, saved, working, 0.0, work.extra)
    head = (4.0 + half * (half == 2)) * sizes.head  # its gradient, and a copy
    if saved + copies + head + logits > gradients + 4.0 * sizes.head:
        return _parts(weights, 0.0, optimizer, copies + head, saved, working, logits, work.extra)
    return _parts(weights, 0.0, optimizer, gradients, 0.0, 4.0 * sizes.head + working, 0.0, work.extra)


def _logits(sizes: ModelSizes, work: Workload, half: int) -> float:
    """The loss: a chunk of logits, the labelled hidden states and their gradient, further bytes of each label."""
    chunk = min(work.chunk_bytes, work.labels * sizes.vocab * half)
    return chunk + work.labels * (3.0 * sizes.hidden * half + work.per_label)


def _parts(*sizes: float) -> MemoryParts:
    return MemoryParts(*(size / GIB for size in sizes))
