"""Decoder layers compiled one by one, and what of them is kept for the backward pass.

    run_layers(model, recompute=True, compiled=True)

All layers go through one compiled function that takes the layer as its argument, so layers of a kind share its graphs:
a model compiles in the time of one local and one global layer. Recompute keeps a layer's input and, when compiled,
what is dear to make and small to keep: products with fewer columns than their input has (down, or a whole MLP). Only
training runs compiled: validation's shapes would cost graphs of their own.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tasks.engine.head import layers_of, unwrap

GRAPHS = 32  # local and global layers, a few lengths: more means that shapes are not static
SAVED, COST = 2e-3, 20.0


def run_layers(
    model: nn.Module,
    recompute: bool,
    compiled: bool,
    random: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Sets how the decoder's layers run while training. `random`: they have dropout, whose state recompute restores."""
    run: Callable[..., Any] = _plain
    if recompute:
        run = functools.partial(_recomputed if compiled else _recomputed_all, random)
    if compiled:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        run = torch.compile(run, dynamic=False, backend=backend)
        # Or the first layer, whose input needs no gradient, would have graphs of its own.
        cast(Any, unwrap(model)).enable_input_require_grads()
    for layer in layers_of(model):
        layer.forward = functools.partial(_run, layer, run)


def compiling_pays(model: nn.Module, micro_batches: int) -> bool:
    """Whether a run is long enough: a layer's training pass saves about `SAVED` seconds, its graphs cost `COST`."""
    layers = layers_of(model)
    return next(model.parameters()).is_cuda and micro_batches * len(layers) * SAVED > 2 * COST


def _run(layer: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (run if layer.training and torch.is_grad_enabled() else _plain)(layer, *args, **kwargs)


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return cast(Any, type(layer)).forward(layer, *args, **kwargs)


def _recomputed_all(random: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(_plain, layer, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)


def _recomputed(random: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        _plain, layer, *args, use_reentrant=False, preserve_rng_state=random, context_fn=_contexts, **kwargs
    )


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What is kept: MLPs and products that give fewer columns than they take."""
    name = str(op)
    if name == "stillhouse.gated_mlp.default":
        return CheckpointPolicy.MUST_SAVE
    inputs = outputs = 0
    if name == "stillhouse.lora_linear.default":
        inputs, outputs = args[3].shape[1], args[4].shape[0]
    elif name in ("aten.mm.default", "aten.addmm.default"):
        inputs, outputs = args[-1].shape
    return CheckpointPolicy.MUST_SAVE if inputs > outputs else CheckpointPolicy.PREFER_RECOMPUTE
