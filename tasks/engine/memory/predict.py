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
DORA = {"qlora": 7.0, "lora": 3.0}  # bytes an element of an adapted matrix's output, fitted to one run each
AWAY_LAYERS = 4  # whose activations are on their way to the host or back, or stay
CHUNK = 4096  # tokens that the MLP as one operation works on at a time (tasks.engine.fused_mlp_dense)
CONTEXT_GIB = 0.6  # CUDA's context and libraries' workspaces, beside what torch allocates
SPARE = 0.04  # of the card, for what lies between blocks


class Load(NamedTuple):
    """What of a config moves memory. `tokens` are a micro-batch's, `labels` those of them with a label; `gated` stands
    for the adapted MLP as one operation (tasks.engine.fused_mlp), `away` for activations kept by the host
    (tasks.engine.offload). `beside` are bytes of what lies beside the trained model, `per_label` bytes that each label
    brings along."""

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
    away: bool = False
    beside: float = 0.0
    per_label: float = 0.0

    @property
    def replayed(self) -> bool:
        """Whether the run is replayed as CUDA graphs, whose gradients always lie in one buffer."""
        return self.precision == "bfloat16" and self.optimizer == "adamw" and not self.dropout


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
        config.compile == "on" and config.gradient_checkpointing and config.precision != "float32",
    )


def predict(shapes: Shapes, load: Load) -> Parts:
    """The peak of a training step, part by part."""
    half = 4 if load.precision == "float32" else 2
    return _whole(shapes, load, half) if load.method == "full" else _adapters(shapes, load, half)


def _adapters(shapes: Shapes, load: Load, half: int) -> Parts:
    """Frozen weights; the adapters, their copies in the products' dtype and their gradients."""
    activations, working = _activations(shapes, load, half)
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
    return _parts(weights, size + copies, optimizer, size, activations, working, 0.0, load.beside)


def _whole(shapes: Shapes, load: Load, half: int) -> Parts:
    """Every weight in float32, and its copy in the products' dtype; gradients in float32."""
    activations, working = _activations(shapes, load, half)
    logits = _logits(shapes, load, half)
    weights, gradients = 4.0 * (shapes.packable + shapes.rest), 4.0 * shapes.trained
    state = OPTIMIZER[load.optimizer]
    optimizer = state * (shapes.trained - shapes.embedded) + (8.0 if state else 0.0) * shapes.embedded
    copies = half * (shapes.trained - shapes.embedded) * (half == 2)  # autocast's, which the backward needs
    if load.replayed:
        copies += half * shapes.head * (half == 2)
        both = max(working, logits)
        return _parts(weights, copies, optimizer, gradients, activations, both, 0.0, load.beside)
    head = (4.0 + half * (half == 2)) * shapes.head  # its gradient, and a copy
    if activations + copies + head + logits > gradients + 4.0 * shapes.head:
        return _parts(weights, 0.0, optimizer, copies + head, activations, working, logits, load.beside)
    return _parts(weights, 0.0, optimizer, gradients, 0.0, 4.0 * shapes.head + working, 0.0, load.beside)


def _logits(shapes: Shapes, load: Load, half: int) -> float:
    """The loss: a chunk of logits, the labelled states and their gradient, what the labels bring along."""
    chunk = min(load.chunk_bytes, load.labels * shapes.vocab * half)
    return chunk + load.labels * (3.0 * shapes.hidden * half + load.per_label)


def _activations(shapes: Shapes, load: Load, half: int) -> tuple[float, float]:
    """Bytes of what is kept for the backward, and of what a layer's work needs for a moment."""
    stream = shapes.streams * shapes.hidden * half
    if load.method == "full" and shapes.stacked and load.replayed and not load.recompute:
        whole = half * (4 * shapes.hidden + 2 * shapes.query + 2 * shapes.key + 2 * shapes.ffn)
        return float(load.tokens * shapes.layers * whole), half * load.tokens * (shapes.ffn + 6.0 * shapes.hidden)
    kept, again, inside = _layer(shapes, load, half)
    of_layers: float = load.tokens * (shapes.layers * kept + stream)
    if load.recompute:
        stays = float((stream + _saved(shapes, load, half)) * shapes.layers)
        if load.away:
            stays += (AWAY_LAYERS - shapes.layers) * (stream + half * shapes.hidden)
        of_layers = load.tokens * (stays + stream + again)
    return of_layers + load.tokens * shapes.layers * shapes.per_layer * half * 2, inside


def _layer(shapes: Shapes, load: Load, half: int) -> tuple[float, float, float]:
    """Bytes a token that a layer keeps for its backward, that it keeps when it is made again, and bytes that its work
    needs for a moment.

    Norms keep their input in float32 (compiled, in the stream's dtype), and what it was divided to where their weight
    is trained; matrices what enters them; attention queries, keys, values and what came out; the gated MLP both
    branches, the activation and where down is trained the product, or as one operation both branches alone, which
    recompute leaves out.
    """
    hidden, ffn, query, key = shapes.hidden, shapes.ffn, shapes.query, shapes.key
    full, gated = load.method == "full", load.gated and shapes.gated
    norms = (half if load.compiled else 4) * (2 if full else 1) * (4 * hidden + query + key)
    matrices = half * ((5 if full else 2) * hidden + 7 * shapes.rank)
    rest = float(norms + matrices + half * (2 * query + 2 * key))
    if load.dropout:  # peft's own forward: what is left of each adapter's input, and which of it
        rest += (half + 1) * shapes.adapted_in
    if load.dora:
        rest += half * shapes.adapted_in + DORA[load.method] * shapes.adapted_out
    if gated:
        chunk = min(load.tokens, CHUNK)
        return rest + half * 2 * ffn, rest, float(half * (chunk * 3 * ffn + load.tokens * 4 * hidden))
    product = full or (shapes.gated and not load.dropout)  # what enters down: only its own gradient needs that
    kept = rest + half * (3 + product) * ffn
    return kept, kept, float(load.tokens * half * (2 * ffn + 4 * hidden))


def _saved(shapes: Shapes, load: Load, half: int) -> float:
    """What compiled layers keep although they recompute: attention's output and the MLP's, with its low ranks."""
    return float(half * (shapes.query + shapes.hidden + 3 * shapes.rank)) if load.compiled else 0.0


def _parts(*sizes: float) -> Parts:
    return Parts(*(size / GIB for size in sizes))
