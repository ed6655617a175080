"""Per-layer torch.compile, and selective activation checkpointing of decoder layers.

    configure_layers(model, recompute=True, compiled=True)

One compiled function takes the layer as its argument, so layers of a kind share its graphs: a model compiles in the
time of one local and one global layer. Checkpointing saves a layer's input and, when compiled, what is expensive to
recompute and small to save: attention's output, and products with fewer columns than their input (down_proj, or a fused
MLP); tasks.engine.speed.offload moves these to the host. Only training runs compiled: validation's shapes would cost
graphs of their own.
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

from tasks.engine.models.lm_head import decoder_layers, unwrap
from tasks.engine.speed.offload import Offload

MAX_GRAPHS = 32  # local and global layers, a few lengths: more means that shapes are not static
# From tests/benchmarks/compiling.py, rounded down: seconds that compiling saves on a micro-batch, per layer and per
# value of its residual stream (tokens x hidden); the factor on both under recompute; seconds that compilation takes.
SECONDS_PER_LAYER, SECONDS_PER_VALUE, RECOMPUTE_FACTOR, COMPILE_SECONDS = 2e-4, 2e-10, 1.7, 20.0
INDUCTOR_OPTIONS: dict[str, Any] = {"triton.multi_kernel": 3}  # persistent reductions for norms of rows over 1024 too
ATTENTION_OPS = ("torch_attn._varlen_attn.default", "aten._scaled_dot_product")  # prefixes of operator names


def configure_layers(
    model: nn.Module,
    recompute: bool,
    compiled: bool,
    has_dropout: bool = False,
    offload_activations: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Sets how the decoder's layers run in training: compiled, checkpointed, their saved activations offloaded.

    `has_dropout`: recompute restores the random state. Layers that cannot be compiled run uncompiled, with a warning.
    """
    forward: Callable[..., Any] = functools.partial(_checkpoint_all, has_dropout) if recompute else _plain
    if compiled:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        selective = functools.partial(_checkpoint_selective, has_dropout) if recompute else _plain
        forward = CompiledLayer(selective, forward, backend, warn)
        # Otherwise the first layer, whose input needs no gradient, would compile graphs of its own.
        cast(Any, unwrap(model)).enable_input_require_grads()
        _compile_norm(model, backend, warn)
    layers = decoder_layers(model)
    offload = Offload(model, len(layers)) if offload_activations and recompute and compiled else None
    for index, layer in enumerate(layers):
        layer.forward = functools.partial(_forward, layer, forward, offload, index)


class CompiledLayer:
    """A compiled function of a layer that warns and switches to `fallback` for good when compilation fails."""

    def __init__(
        self, function: Callable[..., Any], fallback: Callable[..., Any], backend: str | Callable[..., Any],
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        options = INDUCTOR_OPTIONS if backend == "inductor" else None
        self.function: Callable[..., Any] | None = torch.compile(
            function, dynamic=False, backend=backend, options=options
        )
        self.fallback, self.warn = fallback, warn

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Output of the layer."""
        if self.function is not None:
            try:
                return self.function(layer, *args, **kwargs)
            except (TorchDynamoException, InductorError) as error:
                reason = " ".join(str(error).split())[:200]
                self.warn(f"{type(layer).__name__} runs uncompiled: {reason}")
                self.function = None
        return self.fallback(layer, *args, **kwargs)


def _compile_norm(model: nn.Module, backend: str | Callable[..., Any], warn: Callable[[str], None]) -> None:
    """Compiles the final norm, which uncompiled would save three float32 copies of its input."""
    body = cast(Any, unwrap(model).base_model)
    norm = getattr(getattr(body, "language_model", body), "norm", None)
    if isinstance(norm, nn.Module):
        forward = CompiledLayer(_plain, _plain, backend, warn)
        norm.forward = functools.partial(_forward, norm, forward, None, 0)


def compiling_pays(model: nn.Module, micro_batches: int, tokens: float, recompute: bool) -> bool:
    """Whether a run of `micro_batches` of `tokens` each saves more than twice the time that compilation takes."""
    return next(model.parameters()).is_cuda and micro_batches > break_even_micro_batches(model, tokens, recompute)


def break_even_micro_batches(model: nn.Module, tokens: float, recompute: bool) -> float:
    """Number of micro-batches of `tokens` each that save twice the time that compilation takes."""
    return 2 * COMPILE_SECONDS / seconds_saved(model, tokens, recompute)


def seconds_saved(model: nn.Module, tokens: float, recompute: bool) -> float:
    """Seconds that compiled layers save on a micro-batch of `tokens`."""
    layers, hidden = len(decoder_layers(model)), int(unwrap(model).config.get_text_config().hidden_size)
    return layers * (SECONDS_PER_LAYER + SECONDS_PER_VALUE * tokens * hidden) * (RECOMPUTE_FACTOR if recompute else 1.0)


def _forward(
    layer: nn.Module, forward: Callable[..., Any], offload: Offload | None, index: int, *args: Any, **kwargs: Any
) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return _plain(layer, *args, **kwargs)
    with offload.layer(index) if offload else contextlib.nullcontext():
        return forward(layer, *args, **kwargs)


def _plain(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return cast(Any, type(layer)).forward(layer, *args, **kwargs)


def _checkpoint_all(has_dropout: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(_plain, layer, *args, use_reentrant=False, preserve_rng_state=has_dropout, **kwargs)


def _checkpoint_selective(has_dropout: bool, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        _plain, layer, *args, use_reentrant=False, preserve_rng_state=has_dropout, context_fn=_contexts, **kwargs
    )


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Saves attention's output, fused MLPs, and products with fewer output than input columns; recomputes the rest."""
    name = str(op)
    if name == "stillhouse.gated_mlp.default" or name.startswith(ATTENTION_OPS):
        return CheckpointPolicy.MUST_SAVE
    inputs = outputs = 0
    if name == "stillhouse.lora_linear.default":
        inputs, outputs = args[3].shape[1], args[4].shape[0]
    elif name in ("aten.mm.default", "aten.addmm.default"):
        inputs, outputs = args[-1].shape
    return CheckpointPolicy.MUST_SAVE if inputs > outputs else CheckpointPolicy.PREFER_RECOMPUTE
