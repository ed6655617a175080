"""What flows through a model on calibration rows: every linear layer's input, every norm, the stream between layers.

Rows go through one by one, so no padding is in the numbers, with eager attention, which alone shows its weights.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.outliers.layer_statistics import Activations, Channels, Layer, Peak

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")
TOWER = re.compile(r"vision|audio")


@torch.inference_mode()
def observe(model: PreTrainedModel, rows: list[list[int]], job: Job, label: str) -> Activations:
    """Runs token ids `rows` through the model, in the dtype that it has; the head itself is left out."""
    seen = Activations(rows=len(rows), tokens=sum(map(len, rows)))
    now: dict[str, Any] = {}
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with hooked(model, seen, now):
            for number, ids in enumerate(rows):
                now.update(row=number, ids=ids)
                model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                job.progress(number + 1, len(rows), "rows", f"{label}: activations")
    finally:
        model.set_attn_implementation(kept)
    for layer in seen.layers.values():
        layer.sink_mass /= max(1, len(rows))
        layer.sink_norm /= max(1, len(rows))
    for channels in seen.linears.values():
        channels.squares, channels.maxima = channels.squares.cpu(), channels.maxima.cpu()
    return seen


@contextmanager
def hooked(model: nn.Module, seen: Activations, now: dict[str, Any]) -> Iterator[None]:
    """Hooks on every linear layer, norm and decoder layer of the text model, as long as the block lasts."""
    with ExitStack() as stack:

        def add(handle: Any) -> None:
            stack.callback(handle.remove)

        for name, module in model.named_modules():
            if TOWER.search(name) or name.endswith("lm_head"):
                continue
            if isinstance(module, nn.Linear):
                channels = Channels(
                    torch.zeros(module.in_features, dtype=torch.float64, device=module.weight.device),
                    torch.zeros(module.in_features, device=module.weight.device),
                )
                seen.linears[name] = channels
                add(module.register_forward_hook(_linear(channels, seen)))
            elif "norm" in type(module).__name__.lower() and hasattr(module, "weight"):
                add(module.register_forward_hook(_norm(name, seen)))
            if match := LAYER.search(name):
                layer = seen.layers.setdefault(int(match[1]), Layer())
                if match[1] == "0":
                    add(module.register_forward_pre_hook(_embedding(seen, now), with_kwargs=True))
                add(module.register_forward_hook(_output(layer, now)))
                add(_before_mlp(module).register_forward_pre_hook(_middle(layer, now)))
                if attention := getattr(module, "self_attn", None):
                    add(attention.register_forward_hook(_attention(layer)))
        yield


def _before_mlp(layer: nn.Module) -> nn.Module:
    """The norm that reads the stream between attention and MLP."""
    norm = getattr(layer, "pre_feedforward_layernorm", None) or getattr(layer, "post_attention_layernorm", None)
    return norm if isinstance(norm, nn.Module) else layer


def _linear(channels: Channels, seen: Activations) -> Any:
    def hook(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().float().reshape(-1, module.in_features)
        magnitudes = x.abs()
        channels.squares += x.double().square().sum(0)
        torch.maximum(channels.maxima, magnitudes.amax(0), out=channels.maxima)
        channels.token_peaks += float(magnitudes.amax(1).double().square().sum())
        channels.tokens += len(x)
        peak = float(output.detach().abs().max())
        seen.not_finite += peak != peak or peak == float("inf")
        channels.output_peak = max(channels.output_peak, peak)

    return hook


def _norm(name: str, seen: Activations) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.norms[name] = max(seen.norms.get(name, 0.0), float(output.detach().abs().max()))

    return hook


def _embedding(seen: Activations, now: dict[str, Any]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        _raise(seen.embedding, inputs[0] if inputs else options["hidden_states"], now)

    return hook


def _middle(layer: Layer, now: dict[str, Any]) -> Any:
    return lambda module, inputs: _raise(layer.middle, inputs[0], now)


def _output(layer: Layer, now: dict[str, Any]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        _raise(layer.output, stream, now)
        norms = (
            stream.detach().float().flatten(0, -3)[-1].norm(dim=-1)
            if stream.ndim > 3
            else stream[0].float().norm(dim=-1)
        )
        layer.sink_norm += float(norms[0] / norms[1:].median()) if len(norms) > 1 else 1.0

    return hook


def _attention(layer: Layer) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is not None and weights.shape[-2] > 1:  # [1, heads, queries, keys]
            layer.sink_mass += float(weights[0, :, 1:, 0].float().mean())

    return hook


def _raise(peak: Peak, stream: Tensor, now: dict[str, Any]) -> None:
    """Keeps the place of the largest magnitude; `stream` is [..., tokens, channels]."""
    flat = stream.detach().abs().flatten()
    at = int(flat.argmax())
    value = float(flat[at])
    if value > peak.value or value != value:
        channel, position = at % stream.shape[-1], at // stream.shape[-1] % stream.shape[-2]
        peak.value, peak.row, peak.position, peak.channel = value, now["row"], position, channel
        peak.token = now["ids"][position]
