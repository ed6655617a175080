"""Which tensors are norms, and which architectures multiply by `1 + w` instead of `w`."""

import json
import re
from pathlib import Path

# Those whose RMSNorm computes `x * (1 + w)` in transformers' modeling files. Gemma 3n is not among them.
ADD_ONE = {
    "gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "t5gemma", "t5gemma2", "vaultgemma", "paligemma",
    "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "nemotron",
}  # fmt: skip
# Towers inside a Gemma bring their own LayerNorm; Qwen3-Next's gated norm multiplies by w.
PLAIN = re.compile(r"(vision|audio)_(tower|model)|\bvisual\.|linear_attn\.norm")
NORM = re.compile(r"(norm|ln_\w+)\d?\.weight$")
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def is_norm(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a norm's weight."""
    return len(shape) == 1 and NORM.search(name) is not None


def adds_one(base: Path, name: str) -> bool:
    """Whether the norm `name` of the model in `base` multiplies by `1 + w`."""
    model_type = json.loads((base / "config.json").read_text()).get("model_type")
    return model_type in ADD_ONE and PLAIN.search(name) is None


def layer(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside the layers."""
    match = LAYER.search(name)
    return int(match[1]) if match else None


def role(name: str) -> str:
    """The tensor's name within its layer: `self_attn.q_proj`, `input_layernorm`; without `.weight`."""
    return LAYER.split(name)[-1].removesuffix(".weight").removeprefix("model.")
