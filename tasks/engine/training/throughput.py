"""Training speed: tokens a second, peak memory, model FLOPs utilisation (MFU).

MFU as in PaLM's appendix B (arXiv 2204.02311): the operations that the model needs, without recompute, over the card's
peak in the same time. A token costs 2 operations a weight in the forward, 2 in the backward for its own gradient and 2
for a trained weight's; attention 2 * 2 * keys * heads * head_dim in the forward and twice that in the backward. The LM
head counts for labelled tokens only, the embedding not at all.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tasks.core.peak_memory import peak_resident
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.lm_head import decoder_layers, unwrap

# Dense matrix TFLOP/s with float32 accumulation, from NVIDIA's data sheets: bfloat16 where there is it, else float16.
PEAK_TFLOPS = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A10": 125.0, "A6000": 155.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip
WARM_UP_STEPS = 5  # of an attempt: allocations, compilation


def peak_flops(device: str) -> float | None:
    """Peak operations a second of the card; None for one that is not in the table, and for the CPU."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


def peak_gib(device: str) -> float:
    """Peak memory that torch allocated on the card; on the CPU the process's peak resident memory."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return peak_resident() / 2**30


@dataclass(frozen=True)
class TokenCost:
    """Operations, forward and backward: `layers` a token, `head` a label, `pair` for each query and key that meet."""

    layers: float
    head: float
    pair: float

    def step(self, tokens: int, labels: int, pairs: float) -> float:
        """Operations of a step."""
        return self.layers * tokens + self.head * labels + self.pair * pairs


def token_cost(model: PreTrainedModel) -> TokenCost:
    """A model's cost from its linear modules; adapters count by themselves, 4-bit weights by their elements."""
    layers = head = 0.0
    output, family = cast(Any, unwrap(model)).get_output_embeddings(), family_of(unwrap(model).config.model_type)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or family.is_tower(name):
            continue
        cost = float(module.in_features) * float(module.out_features) * (6 if module.weight.requires_grad else 4)
        if module is output:
            head += cost
        else:
            layers += cost
    config = unwrap(model).config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return TokenCost(layers, head, 12.0 * config.num_attention_heads * width * len(decoder_layers(model)))


def attention_pairs(lengths: list[int], model: PreTrainedModel) -> float:
    """Query-key pairs of causal attention over rows of these lengths, in a layer on average."""
    config = unwrap(model).config.get_text_config()
    window = float(getattr(config, "sliding_window", None) or math.inf)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    local: float = sum(kind == "sliding_attention" for kind in kinds) / len(kinds)

    def pairs_within(length: int, window: float) -> float:
        keys = min(float(length), window)
        return keys * keys / 2 + (length - keys) * keys

    return sum(
        local * pairs_within(length, window) + (1 - local) * pairs_within(length, math.inf) for length in lengths
    )


class ThroughputMeter:
    """Seconds, tokens and operations of an attempt's steps."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._cost, self._peak, self._model = token_cost(model), peak_flops(model.device.type), model
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.rows: list[int] = []
        self.flops: list[float] = []

    def step(self, seconds: float, tokens: int, labels: int, lengths: list[int], processes: int) -> dict[str, float]:
        """Records a step and returns its speed: `tokens` over all processes, `labels` and row `lengths` of this one."""
        flops = self._cost.step(tokens // processes, labels, attention_pairs(lengths, self._model))
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.rows.append(len(lengths) * processes)
        self.flops.append(flops)
        speed = {"tokens_per_second": tokens / max(seconds, 1e-9), "peak_gib": peak_gib(self._model.device.type)}
        if self._peak:
            speed["mfu"] = flops / max(seconds, 1e-9) / self._peak
        return speed

    def summary(self) -> dict[str, float]:
        """Medians over the steps after the warm-up, comparable with `tests/benchmarks/sft.py`."""
        measured = slice(WARM_UP_STEPS if len(self.seconds) > 2 * WARM_UP_STEPS else 0, None)
        seconds = self.seconds[measured]
        if not seconds:
            return {}

        def median_rate(amounts: Sequence[float]) -> float:
            return statistics.median(a / max(s, 1e-9) for a, s in zip(amounts[measured], seconds, strict=True))

        speed = {
            "seconds_per_step": statistics.median(seconds),
            "tokens_per_second": median_rate(self.tokens),
            "rows_per_second": median_rate(self.rows),
            "peak_gib": peak_gib(self._model.device.type),
        }
        if self._model.device.type == "cuda":
            speed["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if self._peak:
            speed["mfu"] = median_rate(self.flops) / self._peak
        return speed
