"""Bake-off: one model quantized by one method, and what that cost: bytes, seconds, memory, agreement, speed."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.config import RUN_WIDE, StageConfig

Method = Literal[
    "none",
    "bnb-int8", "bnb-nf4",
    "quanto-int8", "quanto-int4", "quanto-int8-uncalibrated", "quanto-int4-uncalibrated", "quanto-int8-weights",
    "torchao-int8", "torchao-int8-activations", "torchao-int4",
    "gptq", "awq",
]  # fmt: skip


class BakeoffConfig(StageConfig):
    """Which method, in which dtype, and how it is tried."""

    method: Method = "none"
    """Who quantizes; `none` only casts to `dtype`. quanto-int8 and -int4 quantize activations to int8, too."""
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
