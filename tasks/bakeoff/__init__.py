"""Bake-off: one model quantized by one method, and the cost: bytes, seconds, memory, agreement, speed."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.bakeoff import methods as methods  # registers every method
from tasks.bakeoff.registry import METHODS as METHODS
from tasks.bakeoff.registry import MethodName
from tasks.core.config import RUN_WIDE, StageConfig


class BakeoffConfig(StageConfig):
    """Which method quantizes the model, in which dtype, and how the result is compared."""

    method: MethodName = "none"
    """The method; `none` only casts to `dtype`. quanto-int8 and -int4 quantize activations to int8, too."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What is not quantized, and what the method calibrates in."""
    rows: int = Field(default=64, ge=1)
    """Held-out rows on which the quantized model is compared with the model in float32."""
    calibration_rows: int = Field(default=64, ge=1)
    """Rows that a method calibrates on, of `calibration.jsonl` or else `train.jsonl`."""
    max_length: Annotated[int, RUN_WIDE] = Field(default=1024, ge=16)
    """Longer calibration rows are cut to this many tokens."""
    speed_tokens: int = Field(default=64, ge=0)
    """Tokens generated greedily, one row at a time, to measure tokens a second; 0 for none."""
