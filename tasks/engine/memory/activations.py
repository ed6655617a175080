"""What a step keeps of its forward for its backward, and what a layer's work needs for a moment.

Sizes a token follow from the code path: the layers as transformers and autograd have them (`--kept` of
tests/benchmarks/memory.py prints what those keep), or as tasks.engine.speed.gemma3 writes them.
"""

from tasks.engine.memory.model_sizes import Shapes
from tasks.engine.memory.workload import Load

DORA = {"qlora": 7.0, "lora": 3.0}  # bytes an element of an adapted matrix's output, fitted to one run each
AWAY_LAYERS = 4  # whose activations are on their way to the host or back, or stay
CHUNK = 4096  # tokens that the MLP as one operation works on at a time (tasks.engine.speed.fused_lora.mlp_dense)


def activations(shapes: Shapes, load: Load, half: int) -> tuple[float, float]:
    """Bytes of what is kept for the backward, and of what a layer's work needs for a moment."""
    wide = 4 if shapes.streams > 1 else half  # on CUDA autocast squares in float32, so AltUp scales its streams to that
    stream = shapes.streams * shapes.hidden * wide
    if load.method == "full" and shapes.stacked and load.replayed and not load.recompute:
        # Queries, keys, values; attention's output before and behind its matrix, the stream after it; gate, up, down.
        whole = half * (3 * shapes.hidden + 2 * shapes.query + 2 * shapes.key + 2 * shapes.ffn)
        return float(load.tokens * shapes.layers * whole), half * load.tokens * (shapes.ffn + 6.0 * shapes.hidden)
    kept, again, inside = _layer(shapes, load, half)
    if shapes.streams > 1:
        more, at_once = _altup(shapes, half)
        # A sparse MLP is no single operation: gate, up, relu and activation in float32, in half precision the product.
        # Recomputed it needs more than other MLPs too, but early, while fewer streams wait (the first 10 of 30 layers).
        sparse = (16 - half) * shapes.ffn * shapes.sparse / shapes.layers
        kept, again, inside = kept + more + stream + sparse, again + more, max(inside, load.tokens * at_once)
    of_layers: float = load.tokens * (shapes.layers * kept + stream)
    if load.recompute:
        stays = float((stream + _saved(shapes, load, half)) * shapes.layers)
        if load.away:
            stays += (AWAY_LAYERS - shapes.layers) * (stream + half * shapes.hidden)
        of_layers = load.tokens * (stays + stream + again)
    # Per-layer embeddings, and in float32 what enters the norm of their adapted projection.
    return of_layers + load.tokens * shapes.layers * shapes.per_layer * (half + 4.0), inside


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


def _altup(shapes: Shapes, half: int) -> tuple[float, float]:
    """Bytes a token that AltUp and LAuReL (Gemma 3n) add to what a layer keeps, and those that are there for a moment
    when it has just been made again.

    Kept: predictions and the innovation of each stream in float32, the streams as their product takes them, norms
    (LAuReL's, the router's, the per-layer input's, values') less the one that the predictions hold, inputs that q, k, v
    and LAuReL each take to half precision, the per-layer gate. For a moment: the streams' gradient, and what the
    layer's variables hold until it returns (six in float32, three in half precision).
    """
    hidden, streams = shapes.hidden, shapes.streams * shapes.hidden
    kept = (8 + half) * streams + 4 * (2 * hidden + shapes.key) + half * 4 * hidden + (8 + half) * shapes.per_layer
    return float(kept), 4.0 * (streams + 6 * hidden) + half * 3.0 * hidden


def _saved(shapes: Shapes, load: Load, half: int) -> float:
    """What compiled layers keep although they recompute: attention's output and the MLP's, with its low ranks."""
    return float(half * (shapes.query + shapes.hidden + 3 * shapes.rank)) if load.compiled else 0.0
