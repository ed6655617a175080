"""Which device and which number format a model is loaded and trained in."""

from pathlib import Path

import torch

from tasks.core.errors import BadConfig
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.model_config import read_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device() -> str:
    """`cuda` if there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(precision: str, device: str) -> torch.dtype:
    """The dtype of frozen weights. `auto` is bfloat16 on a CUDA device that has it, else float32.

    In float16 only matrices are kept (tasks.engine.models.float16): Gemma 3's residual stream passes its largest
    number.
    """
    if precision == "auto":
        return torch.bfloat16 if device.startswith("cuda") and _has_bfloat16() else torch.float32
    if precision not in DTYPES:
        raise BadConfig(f"precision {precision!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[precision]


def training_precision(precision: str, base: Path, device: str) -> str:
    """The precision of training's matrix products. `auto` is the first of bfloat16, float16 and float32 that the device
    has and the family trains in."""
    if precision != "auto":
        return precision
    if not device.startswith("cuda"):
        return "float32"
    if _has_bfloat16():
        return "bfloat16"
    return "float16" if family_of(read_config(base).get_text_config().model_type).trains_in_float16 else "float32"


def _has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
