"""Decoder layers compiled one by one, and what of them is kept for the backward pass.

    run_layers(model, recompute=True, compiled=True)

All layers go through one compiled function that takes the layer as its argument, so layers of a kind share its graphs:
a model compiles in the time of one local and one global layer. Recompute keeps a layer's input and, when compiled,
what is dear to make and small to keep: attention's output, and products with fewer columns than their input has (down,
or a whole MLP); with `away` it is kept in the host's memory (tasks.engine.speed.offload). Only training runs compiled:
validation's shapes would cost graphs of their own.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tasks.engine.models.lm_head import layers_of, unwrap
from tasks.engine.speed.offload import Offload

GRAPHS = 32  # local and global layers, a few lengths: more means that shapes are not static
# Seconds, rounded down from tests/benchmarks/compiling.py: a layer's pass saves so much, and so much for each token and
# value of the residual stream; with recompute more. Making the graphs takes `COST`.
SAVED, SAVED_A_VALUE, RECOMPUTED, COST = 2e-4, 2e-10, 1.7, 20.0
OPTIONS: dict[str, Any] = {"triton.multi_kernel": 3}  # a norm's row in registers even where it is longer than 1024
ATTENTION = ("torch_attn._varlen_attn.default", "aten._scaled_dot_product")  # beginnings of names


def run_layers(
    model: nn.Module,
    recompute: bool,
    compiled: bool,
    random: bool = False,
    away: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Sets how the decoder's layers run while training. `random`: they have dropout, whose state recompute restores.

    Layers that cannot be compiled run as they are, and `warn` is told why.
    """
    run: Callable[..., Any] = functools.partial(_recomputed_all, random) if recompute else _plain
    if compiled:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        selective = functools.partial(_recomputed, random) if recompute else _plain
        run = Compiled(selective, run, backend, warn)
        # Or the first layer, whose input needs no gradient, would have graphs of its own.
        cast(Any, unwrap(model)).enable_input_require_grads()
        _compile_norm(model, backend, warn)
    layers = layers_of(model)
    offload = Offload(model, len(layers)) if away and recompute and compiled else None
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(_run, layer, run, offload, number)


class Compiled:
    """A function of a layer, compiled; `otherwise` does its work from the first time on that compiling fails."""

    def __init__(
        self, function: Callable[..., Any], otherwise: Callable[..., Any], backend: str | Callable[..., Any],
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        options = OPTIONS if backend == "inductor" else None
        self.function: Callable[..., Any] | None = torch.compile(
            function, dynamic=False, backend=backend, options=options
        )
        self.otherwise, self.warn = otherwise, warn

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        if self.function is not None:
            try:
                return self.function(layer, *args, **kwargs)
            except (TorchDynamoException, InductorError) as error:
                reason = " ".join(str(error).split())[:200]
                self.warn(f"{type(layer).__name__} runs uncompiled: {reason}")
                self.function = None
        return self.otherwise(layer, *args, **kwargs)


def _compile_norm(model: nn.Module, backend: str | Callable[..., Any], warn: Callable[[str], None]) -> None:
    """The norm behind the last layer, which would keep its input in float32 three times over."""
    body = cast(Any, unwrap(model).base_model)
    norm = getattr(getattr(body, "language_model", body), "norm", None)
    if isinstance(norm, nn.Module):
        run = Compiled(_plain, _plain, backend, warn)
        norm.forward = functools.partial(_run, norm, run, None, 0)


def compiling_pays(model: nn.Module, micro_batches: int, tokens: float, recompute: bool) -> bool:
    """Whether a run of so many micro-batches of so many tokens wins back what compiling costs, twice."""
    return next(model.parameters()).is_cuda and micro_batches > pays_after(model, tokens, recompute)


def pays_after(model: nn.Module, tokens: float, recompute: bool) -> float:
    """Micro-batches of so many tokens that win back twice what compiling costs."""
    return 2 * COST / saved(model, tokens, recompute)


def saved(model: nn.Module, tokens: float, recompute: bool) -> float:
    """Seconds that compiled layers save on a micro-batch."""
    layers, hidden = len(layers_of(model)), int(unwrap(model).config.get_text_config().hidden_size)
    return layers * (SAVED + SAVED_A_VALUE * tokens * hidden) * (RECOMPUTED if recompute else 1.0)


def _run(
    layer: nn.Module, run: Callable[..., Any], offload: Offload | None, number: int, *args: Any, **kwargs: Any
) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return _plain(layer, *args, **kwargs)
    with offload.layer(number) if offload else contextlib.nullcontext():
        return run(layer, *args, **kwargs)


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
    """What is kept: attention's output, MLPs, and products that give fewer columns than they take."""
    name = str(op)
    if name == "stillhouse.gated_mlp.default" or name.startswith(ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    inputs = outputs = 0
    if name == "stillhouse.lora_linear.default":
        inputs, outputs = args[3].shape[1], args[4].shape[0]
    elif name in ("aten.mm.default", "aten.addmm.default"):
        inputs, outputs = args[-1].shape
    return CheckpointPolicy.MUST_SAVE if inputs > outputs else CheckpointPolicy.PREFER_RECOMPUTE
