"""How much of a card's memory a training run will fill, before anything is loaded.

    parts = predict(shapes_of(base, config, "qlora"), load_of(config, "qlora", tokens=8192))
    parts.peak, parts.card

A peak is weights + optimizer state + the larger of two moments: the end of the forward, when every layer's activations
wait for the backward, and the end of the backward, when every gradient is there. Sizes are counted on torch's meta
device (tasks.engine.memory.shapes); what a layer keeps a token follows from the code path below.
`tests/benchmarks/memory.py` holds it against a GPU.
"""

from typing import NamedTuple

from tasks.core.training import TrainingConfig
from tasks.engine.memory.shapes import Shapes
from tasks.engine.trainable import Method

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes an element: a code, its block's scale in 8 bits, that one's scale in 32
OPTIMIZER = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0.0}  # bytes a trained element; paged: host
DORA = 7.1  # bytes an element of an adapted matrix's output, fitted to one run of tests/benchmarks/memory.py
CHUNK = 4096  # tokens that the MLP as one operation works on at a time (tasks.engine.fused_mlp)
CONTEXT_GIB = 0.6  # CUDA's context and libraries' workspaces, beside what torch allocates
SPARE = 0.04  # of the card, for what lies between blocks


class Load(NamedTuple):
    """What of a config moves memory. `tokens` are a micro-batch's, `labels` those of them with a label; `gated` stands
    for the adapted MLP as one operation (tasks.engine.fused_mlp)."""

    method: Method
    tokens: int
    labels: int
    precision: str
    recompute: bool
    optimizer: str
    dora: bool
    dropout: bool
    compiled: bool
    gated: bool
    chunk_bytes: int


class Parts(NamedTuple):
    """GiB of each part at the peak."""

    weights: float
    trained: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    logits: float

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
        return {**self._asdict(), "peak": self.peak, "card": self.card}


def load_of(config: TrainingConfig, method: Method, tokens: int, labels: int | None = None) -> Load:
    """A config's part in it, with micro-batches of `tokens` tokens."""
    return Load(
        method,
        tokens,
        tokens if labels is None else labels,
        config.precision,
        config.gradient_checkpointing,
        config.optimizer,
        config.use_dora and method != "full",
        config.dropout > 0 and method != "full",
        config.compile == "on",
        method != "full" and not config.use_dora and config.dropout == 0,
        config.loss_chunk_mib << 20,
    )


def predict(shapes: Shapes, load: Load) -> Parts:
    """The peak of a training step, part by part."""
    half = 4 if load.precision == "float32" else 2
    full = load.method == "full"
    kept, again, inside = _layer(shapes, load, half)
    stream = shapes.streams * shapes.hidden * half
    if load.recompute:
        activations = load.tokens * (shapes.layers * (stream + _saved(shapes, load, half)) + stream + again)
    else:
        activations = load.tokens * (shapes.layers * kept + stream)
    activations += load.tokens * shapes.layers * shapes.per_layer * half * 2
    logits = min(load.chunk_bytes, load.labels * shapes.vocab * half) + 2.0 * load.labels * shapes.hidden * half
    working = inside
    if not full:
        packed = load.method == "qlora"
        weights = shapes.packable * (NF4 if packed else half) + shapes.rest * half
        working = max(working + 2.0 * shapes.largest * half * packed, logits)
        size = 4.0 * shapes.trained
        return _parts(weights, size, OPTIMIZER[load.optimizer] * shapes.trained, size, activations, working, 0.0)
    weights, gradients = 4.0 * (shapes.packable + shapes.rest), 4.0 * shapes.trained
    state = OPTIMIZER[load.optimizer]
    optimizer = state * (shapes.trained - shapes.embedded) + (8.0 if state else 0.0) * shapes.embedded
    copies = half * (shapes.trained - shapes.embedded) * (half == 2)  # autocast's, which the backward needs
    head = (4.0 + half * (half == 2)) * shapes.head  # its gradient, and a copy
    if activations + copies + head + logits > gradients + 4.0 * shapes.head:
        return _parts(weights, 0.0, optimizer, copies + head, activations, working, logits)
    return _parts(weights, 0.0, optimizer, gradients, 0.0, 4.0 * shapes.head + working, 0.0)


def _layer(shapes: Shapes, load: Load, half: int) -> tuple[float, float, float]:
    """Bytes a token that a layer keeps for its backward, that it keeps when it is made again, and bytes that its work
    needs for a moment.

    Norms keep their input in float32 (compiled, in the stream's dtype), and what it was divided to where their weight
    is trained; matrices what enters them; attention queries, keys, values and what came out; the gated MLP both
    branches, the activation and the product, or as one operation both branches alone, which recompute leaves out.
    """
    hidden, ffn, query, key = shapes.hidden, shapes.ffn, shapes.query, shapes.key
    full, gated = load.method == "full", load.gated and shapes.gated
    norms = (half if load.compiled else 4) * (2 if full else 1) * (4 * hidden + query + key)
    matrices = half * ((5 if full else 2) * hidden + 7 * shapes.rank)
    rest = float(norms + matrices + half * (2 * query + 2 * key))
    if load.dropout:  # peft's own forward: a copy of what enters each adapter, and what was dropped
        rest += (half + 1 + half) * shapes.adapted_in
    if load.dora:
        rest += half * shapes.adapted_in + DORA * shapes.adapted_out
    if gated:
        chunk = min(load.tokens, CHUNK)
        return rest + half * 2 * ffn, rest, float(half * (chunk * 3 * ffn + load.tokens * 4 * hidden))
    kept = rest + half * 4 * ffn
    return kept, kept, float(load.tokens * half * (2 * ffn + 4 * hidden))


def _saved(shapes: Shapes, load: Load, half: int) -> float:
    """What compiled layers keep although they recompute: attention's output and the MLP's, with its low ranks."""
    return float(half * (shapes.query + shapes.hidden + 3 * shapes.rank)) if load.compiled else 0.0


def _parts(*sizes: float) -> Parts:
    return Parts(*(size / GIB for size in sizes))
