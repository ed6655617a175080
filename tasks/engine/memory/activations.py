"""Activation memory of a training step: what is saved for the backward, and what a layer's work needs temporarily.

Sizes a token follow from the code path: the layers as transformers and autograd have them (`--kept` of
tests/benchmarks/memory.py prints what those save), or as tasks.engine.speed.gemma3 writes them.
"""

from tasks.engine.memory.model_sizes import ModelSizes
from tasks.engine.memory.workload import Workload

DORA = {"qlora": 7.0, "lora": 3.0}  # bytes an element of an adapted matrix's output, fitted to one run each
IN_TRANSIT = 4  # layers whose offloaded activations are on the device: being copied, or of the last layers
CHUNK = 4096  # tokens that the MLP as one operation works on at a time (tasks.engine.speed.fused_lora.mlp_dense)


def activations(sizes: ModelSizes, work: Workload, half: int) -> tuple[float, float]:
    """Bytes that are saved for the backward, and bytes that a layer's work needs temporarily."""
    wide = 4 if sizes.streams > 1 else half  # on CUDA autocast squares in float32, so AltUp scales its streams to that
    stream = sizes.streams * sizes.hidden * wide
    if work.method == "full" and sizes.handwritten and work.cuda_graphs and not work.recompute:
        # Queries, keys, values; attention's output before and after its matrix, the stream after it; gate, up, down.
        layer = half * (3 * sizes.hidden + 2 * sizes.query + 2 * sizes.key + 2 * sizes.ffn)
        return float(work.tokens * sizes.layers * layer), half * work.tokens * (sizes.ffn + 6.0 * sizes.hidden)
    saved, recomputed, working = _layer(sizes, work, half)
    if sizes.streams > 1:
        altup_saved, altup_working = _altup(sizes, half)
        # A sparse MLP is no single operation: gate, up, relu and activation in float32, in half precision the product.
        # Recomputed it needs more than other MLPs too, but early, while fewer streams wait (the first 10 of 30 layers).
        sparse = (16 - half) * sizes.ffn * sizes.sparse_layers / sizes.layers
        saved, recomputed = saved + altup_saved + stream + sparse, recomputed + altup_saved
        working = max(working, work.tokens * altup_working)
    total: float = work.tokens * (sizes.layers * saved + stream)
    if work.recompute:
        checkpointed = float((stream + _saved_despite_recompute(sizes, work, half)) * sizes.layers)
        if work.offloaded:
            checkpointed += (IN_TRANSIT - sizes.layers) * (stream + half * sizes.hidden)
        total = work.tokens * (checkpointed + stream + recomputed)
    # Per-layer embeddings, and in float32 what enters the norm of their adapted projection.
    return total + work.tokens * sizes.layers * sizes.per_layer * (half + 4.0), working


def _layer(sizes: ModelSizes, work: Workload, half: int) -> tuple[float, float, float]:
    """Bytes a token that a layer saves for its backward, that it saves when it is recomputed, and bytes that its work
    needs temporarily.

    Norms save their input in float32 (compiled, in the stream's dtype), and the normalized input where their weight
    is trained; matrices their input; attention queries, keys, values and its output; the gated MLP both
    branches, the activation and where down is trained the product, or as one operation both branches alone, which
    recompute leaves out.
    """
    hidden, ffn, query, key = sizes.hidden, sizes.ffn, sizes.query, sizes.key
    full, fused_mlp = work.method == "full", work.fused_mlp and sizes.mlp_adapted
    norms = (half if work.compiled else 4) * (2 if full else 1) * (4 * hidden + query + key)
    matrices = half * ((5 if full else 2) * hidden + 7 * sizes.rank)
    outside_mlp = float(norms + matrices + half * (2 * query + 2 * key))
    if work.dropout:  # peft's own forward: each adapter's input after dropout, and the mask
        outside_mlp += (half + 1) * sizes.adapted_in
    if work.dora:
        outside_mlp += half * sizes.adapted_in + DORA[work.method] * sizes.adapted_out
    if fused_mlp:
        chunk = min(work.tokens, CHUNK)
        return outside_mlp + half * 2 * ffn, outside_mlp, float(half * (chunk * 3 * ffn + work.tokens * 4 * hidden))
    product = full or (sizes.mlp_adapted and not work.dropout)  # down's input: only down's own gradient needs it
    saved = outside_mlp + half * (3 + product) * ffn
    return saved, saved, float(work.tokens * half * (2 * ffn + 4 * hidden))


def _altup(sizes: ModelSizes, half: int) -> tuple[float, float]:
    """Bytes a token that AltUp and LAuReL (Gemma 3n) add to what a layer saves, and temporary bytes of its recompute.

    Saved: predictions and the innovation of each stream in float32, the streams as their product takes them, norms
    (LAuReL's, the router's, the per-layer input's, values') less the one that the predictions hold, inputs that q, k, v
    and LAuReL each cast to half precision, the per-layer gate. Temporary: the streams' gradient, and the layer's local
    variables until it returns (six in float32, three in half precision).
    """
    hidden, streams = sizes.hidden, sizes.streams * sizes.hidden
    saved = (8 + half) * streams + 4 * (2 * hidden + sizes.key) + half * 4 * hidden + (8 + half) * sizes.per_layer
    return float(saved), 4.0 * (streams + 6 * hidden) + half * 3.0 * hidden


def _saved_despite_recompute(sizes: ModelSizes, work: Workload, half: int) -> float:
    """What compiled layers save although they recompute: attention's output and the MLP's, with its low ranks."""
    return float(half * (sizes.query + sizes.hidden + 3 * sizes.rank)) if work.compiled else 0.0
