"""How much of a card's memory a training run will fill, before anything is loaded.

    parts = predict(shapes_of(base, config, "qlora"), load_of(config, "qlora", tokens=8192))
    parts.peak, parts.card

A peak is weights + optimizer state + the larger of two moments: the end of the forward, when every layer's activations
wait for the backward, and the end of the backward, when every gradient is there. Sizes are counted on torch's meta
device (tasks.engine.memory.model_sizes); what a layer keeps a token is in tasks.engine.memory.activations.
`tests/benchmarks/memory.py` holds it against a GPU.
"""

from typing import NamedTuple

from tasks.engine.memory.activations import activations
from tasks.engine.memory.model_sizes import Shapes
from tasks.engine.memory.workload import Load

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes an element: a code, its block's scale in 8 bits, that one's scale in 32
OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0.0}  # bytes a trained element; paged: host
CONTEXT_GIB = 0.6  # CUDA's context and libraries' workspaces, beside what torch allocates
SPARE = 0.04  # of the card, for what lies between blocks


class Parts(NamedTuple):
    """GiB of each part at the peak."""

    weights: float
    trained: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    logits: float
    beside: float = 0.0

    @property
    def peak(self) -> float:
        """What torch will have allocated at most."""
        return sum(self)

    @property
    def card(self) -> float:
        """What the card must have."""
        return (self.peak + CONTEXT_GIB) / (1 - SPARE)

    def table(self) -> dict[str, float]:
        """By name, with the sums."""
        found = {name: value for name, value in self._asdict().items() if value or name != "beside"}
        return {**found, "peak": self.peak, "card": self.card}


def predict(shapes: Shapes, load: Load) -> Parts:
    """The peak of a training step, part by part."""
    half = 4 if load.precision == "float32" else 2
    return _whole(shapes, load, half) if load.method == "full" else _adapters(shapes, load, half)


def _adapters(shapes: Shapes, load: Load, half: int) -> Parts:
    """Frozen weights; the adapters, their copies in the products' dtype and their gradients."""
    kept, working = activations(shapes, load, half)
    packed = load.method == "qlora"
    weights = shapes.packable * (NF4 if packed else half) + shapes.rest * half
    dense = (
        packed * half * (1.6 * 3 * shapes.ffn * shapes.hidden if load.gated and shapes.gated else 2 * shapes.largest)
    )
    if load.dora:  # for a matrix's norms peft multiplies its adapter by the identity, and adds it to the weight
        widest = shapes.ffn if shapes.gated else shapes.hidden
        dense += (4 + half) * widest**2 + 2 * half * shapes.largest
    copies = half * shapes.trained * (1.0 if packed else 2.0) if load.gated else 0.0  # once more in dense weights
    working = max(working + dense, _logits(shapes, load, half))
    size = 4.0 * shapes.trained
    optimizer = OPTIMIZER[load.optimizer] * shapes.trained
    return _parts(weights, size + copies, optimizer, size, kept, working, 0.0, load.beside)


def _whole(shapes: Shapes, load: Load, half: int) -> Parts:
    """Every weight in float32, and its copy in the products' dtype; gradients in float32."""
    kept, working = activations(shapes, load, half)
    logits = _logits(shapes, load, half)
    weights, gradients = 4.0 * (shapes.packable + shapes.rest), 4.0 * shapes.trained
    state = OPTIMIZER[load.optimizer]
    optimizer = state * (shapes.trained - shapes.embedded) + (8.0 if state else 0.0) * shapes.embedded
    copies = half * (shapes.trained - shapes.embedded) * (half == 2)  # autocast's, which the backward needs
    if load.replayed:
        copies += half * shapes.head * (half == 2)
        both = max(working, logits)
        return _parts(weights, copies, optimizer, gradients, kept, both, 0.0, load.beside)
    head = (4.0 + half * (half == 2)) * shapes.head  # its gradient, and a copy
    if kept + copies + head + logits > gradients + 4.0 * shapes.head:
        return _parts(weights, 0.0, optimizer, copies + head, kept, working, logits, load.beside)
    return _parts(weights, 0.0, optimizer, gradients, 0.0, 4.0 * shapes.head + working, 0.0, load.beside)


def _logits(shapes: Shapes, load: Load, half: int) -> float:
    """The loss: a chunk of logits, the labelled states and their gradient, what the labels bring along."""
    chunk = min(load.chunk_bytes, load.labels * shapes.vocab * half)
    return chunk + load.labels * (3.0 * shapes.hidden * half + load.per_label)


def _parts(*sizes: float) -> Parts:
    return Parts(*(size / GIB for size in sizes))
