"""What a tensor's name says: its layer, whether it is a norm, and whether that is stored as gain or gain - 1."""

import re
from pathlib import Path

from tasks.engine.models.family_registry import family_in

NORM = re.compile(r"(norm|ln_\w+)\d?\.weight$")
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def is_norm(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a norm's weight."""
    return len(shape) == 1 and NORM.search(name) is not None


def gain_offset(base: Path, name: str) -> float:
    """What the norm `name` of the model in `base` adds to its stored weight: 1.0 where that is gain - 1, else 0.0."""
    return family_in(base).gain_offset(name)


def layer_index(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside the layers."""
    match = LAYER.search(name)
    return int(match[1]) if match else None


def name_in_layer(name: str) -> str:
    """The tensor's name within its layer: `self_attn.q_proj`, `input_layernorm`; without `.weight`."""
    return LAYER.split(name)[-1].removesuffix(".weight").removeprefix("model.")
