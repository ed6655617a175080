"""How fast a run is, in numbers that other runs' can be held against: tokens a second, peak memory, MFU.

Model FLOPs utilisation as in PaLM's appendix B (arXiv 2204.02311): the operations that the model needs, whatever is
computed twice, over what the card could do in the time. A token costs 2 operations a weight in the forward, 2 in the
backward for its own gradient and 2 for a trained weight's; attention 2 * 2 * (keys seen) * heads * head_dim forward
and twice that backward. The head counts for labelled tokens only, the embedding's look-up not at all.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tasks.core.peak_memory import peak_resident
from tasks.engine.models.lm_head import layers_of, unwrap
from tasks.engine.models.load import TOWERS

# Dense matrix TFLOP/s with float32 accumulation, from NVIDIA's data sheets: bfloat16 where there is it, else float16.
PEAK = {
    "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A10": 125.0, "A6000": 155.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip
SKIPPED = 5  # first steps of a try: allocations, compilation


def peak_flops(device: str) -> float | None:
    """What the card could do a second; None for one that is not in the table, and for the CPU."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((tera * 1e12 for key, tera in PEAK.items() if key in name), None)


def peak_gib(device: str) -> float:
    """The most that torch had allocated on the card; on the CPU the most that this process had in memory."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return peak_resident() / 2**30


@dataclass(frozen=True)
class Cost:
    """Operations a token, forward and backward: `layers` for each, `head` for each with a label, `pair` for each
    query and key that meet."""

    layers: float
    head: float
    pair: float

    def step(self, tokens: int, labels: int, pairs: float) -> float:
        """Operations of a step."""
        return self.layers * tokens + self.head * labels + self.pair * pairs


def cost_of(model: PreTrainedModel) -> Cost:
    """The cost of a model's token from its modules; adapters count as they are, 4-bit weights by their elements."""
    layers = head = 0.0
    output = cast(Any, unwrap(model)).get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or any(tower in name for tower in TOWERS):
            continue
        cost = float(module.in_features) * float(module.out_features) * (6 if module.weight.requires_grad else 4)
        if module is output:
            head += cost
        else:
            layers += cost
    config = unwrap(model).config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(layers, head, 12.0 * config.num_attention_heads * width * len(layers_of(model)))


def pairs(lengths: list[int], model: PreTrainedModel) -> float:
    """Queries and keys that meet in causal attention over rows of these lengths, a layer on average."""
    config = unwrap(model).config.get_text_config()
    window = float(getattr(config, "sliding_window", None) or math.inf)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    local: float = sum(kind == "sliding_attention" for kind in kinds) / len(kinds)

    def met(length: int, most: float) -> float:
        near = min(float(length), most)
        return near * near / 2 + (length - near) * near

    return sum(local * met(length, window) + (1 - local) * met(length, math.inf) for length in lengths)


class Meter:
    """Seconds, tokens and operations of a try's steps."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._cost, self._peak, self._model = cost_of(model), peak_flops(model.device.type), model
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.rows: list[int] = []
        self.flops: list[float] = []

    def step(self, seconds: float, tokens: int, labels: int, lengths: list[int], processes: int) -> dict[str, float]:
        """Records a step of `tokens` tokens over all processes (`lengths` are one's own rows); its numbers."""
        flops = self._cost.step(tokens // processes, labels, pairs(lengths, self._model))  # of this process
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.rows.append(len(lengths) * processes)
        self.flops.append(flops)
        told = {"tokens_per_second": tokens / max(seconds, 1e-9), "peak_gib": peak_gib(self._model.device.type)}
        if self._peak:
            told["mfu"] = flops / max(seconds, 1e-9) / self._peak
        return told

    def summary(self) -> dict[str, float]:
        """The median step's numbers, its first few steps left out: comparable with `tests/benchmarks/sft.py`."""
        later = slice(SKIPPED if len(self.seconds) > 2 * SKIPPED else 0, None)
        seconds = self.seconds[later]
        if not seconds:
            return {}
        told = {
            "seconds_per_step": statistics.median(seconds),
            "tokens_per_second": statistics.median(
                t / max(s, 1e-9) for t, s in zip(self.tokens[later], seconds, strict=True)
            ),
            "rows_per_second": statistics.median(
                r / max(s, 1e-9) for r, s in zip(self.rows[later], seconds, strict=True)
            ),
        }
        told["peak_gib"] = peak_gib(self._model.device.type)
        if self._model.device.type == "cuda":
            told["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if self._peak:
            rates = [f / max(s, 1e-9) for f, s in zip(self.flops[later], seconds, strict=True)]
            told["mfu"] = statistics.median(rates) / self._peak
        return told
