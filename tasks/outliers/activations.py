"""Measures a model's activations on calibration rows with forward hooks: linear inputs, norms, the residual stream.

Rows run one by one, so that no padding is measured, with eager attention, the only one that returns its weights.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.engine.models.family_registry import family_of
from tasks.outliers.activation_statistics import ActivationStatistics, ChannelStatistics, LayerStatistics, Peak

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")


@dataclass
class CurrentRow:
    """The row that runs through the model at the moment, for hooks that note where a peak was."""

    index: int = 0
    input_ids: list[int] = field(default_factory=list)


@torch.inference_mode()
def observe(model: PreTrainedModel, rows: list[list[int]], job: Job, label: str) -> ActivationStatistics:
    """Runs the token ids of each row through the model in its own dtype, without the LM head."""
    statistics = ActivationStatistics(rows=len(rows), tokens=sum(map(len, rows)))
    current = CurrentRow()
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with activation_hooks(model, statistics, current):
            for index, ids in enumerate(rows):
                current.index, current.input_ids = index, ids
                model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                job.progress(index + 1, len(rows), "rows", f"{label}: activations")
    finally:
        model.set_attn_implementation(attention)
    for layer in statistics.layers.values():
        layer.sink_mass /= max(1, len(rows))
        layer.sink_norm /= max(1, len(rows))
    for channels in statistics.linears.values():
        channels.squares, channels.maxima = channels.squares.cpu(), channels.maxima.cpu()
    return statistics


@contextmanager
def activation_hooks(model: nn.Module, statistics: ActivationStatistics, current: CurrentRow) -> Iterator[None]:
    """Hooks on every linear layer, norm and decoder layer of the text model while the block runs."""
    family = family_of(cast(Any, model).config.model_type)
    with ExitStack() as stack:

        def add(handle: Any) -> None:
            stack.callback(handle.remove)

        for name, module in model.named_modules():
            if family.is_tower(name) or name.endswith("lm_head"):
                continue
            if isinstance(module, nn.Linear):
                channels = ChannelStatistics(
                    torch.zeros(module.in_features, dtype=torch.float64, device=module.weight.device),
                    torch.zeros(module.in_features, device=module.weight.device),
                )
                statistics.linears[name] = channels
                add(module.register_forward_hook(_linear(channels, statistics)))
            elif "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
                add(module.register_forward_hook(_norm(name, statistics)))
            if match := LAYER.search(name):
                layer = statistics.layers.setdefault(int(match[1]), LayerStatistics())
                if match[1] == "0":
                    add(module.register_forward_pre_hook(_embedding(statistics, current), with_kwargs=True))
                add(module.register_forward_hook(_output(layer, current)))
                add(_before_mlp(module).register_forward_pre_hook(_middle(layer, current)))
                if attention := getattr(module, "self_attn", None):
                    add(attention.register_forward_hook(_attention(layer)))
        yield


def _before_mlp(layer: nn.Module) -> nn.Module:
    """The norm that reads the stream between attention and MLP."""
    norm = getattr(layer, "pre_feedforward_layernorm", None) or getattr(layer, "post_attention_layernorm", None)
    return norm if isinstance(norm, nn.Module) else layer


def _linear(channels: ChannelStatistics, statistics: ActivationStatistics) -> Any:
    def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().float().reshape(-1, module.in_features)
        magnitudes = x.abs()
        channels.squares += x.double().square().sum(0)
        torch.maximum(channels.maxima, magnitudes.amax(0), out=channels.maxima)
        channels.token_peaks += float(magnitudes.amax(1).double().square().sum())
        channels.tokens += len(x)
        peak = float(output.detach().abs().max())
        statistics.not_finite += peak != peak or peak == float("inf")
        channels.output_peak = max(channels.output_peak, peak)

    return hook


def _norm(name: str, statistics: ActivationStatistics) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        statistics.norms[name] = max(statistics.norms.get(name, 0.0), float(output.detach().abs().max()))

    return hook


def _embedding(statistics: ActivationStatistics, current: CurrentRow) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        _update_peak(statistics.embedding, inputs[0] if inputs else options["hidden_states"], current)

    return hook


def _middle(layer: LayerStatistics, current: CurrentRow) -> Any:
    return lambda module, inputs: _update_peak(layer.middle, inputs[0], current)


def _output(layer: LayerStatistics, current: CurrentRow) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        _update_peak(layer.output, stream, current)
        norms = (
            stream.detach().float().flatten(0, -3)[-1].norm(dim=-1)
            if stream.ndim > 3
            else stream[0].float().norm(dim=-1)
        )
        layer.sink_norm += float(norms[0] / norms[1:].median()) if len(norms) > 1 else 1.0

    return hook


def _attention(layer: LayerStatistics) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is not None and weights.shape[-2] > 1:  # [1, heads, queries, keys]
            layer.sink_mass += float(weights[0, :, 1:, 0].float().mean())

    return hook


def _update_peak(peak: Peak, stream: Tensor, current: CurrentRow) -> None:
    """Raises `peak` to the largest magnitude of `stream` [..., tokens, channels], with its token and channel."""
    flat = stream.detach().abs().flatten()
    index = int(flat.argmax())
    value = float(flat[index])
    if value > peak.value or value != value:
        channel, position = index % stream.shape[-1], index // stream.shape[-1] % stream.shape[-2]
        peak.value, peak.row, peak.position, peak.channel = value, current.index, position, channel
        peak.token = current.input_ids[position]
