"""Outlier audit: finds what quantization would break in a model, in which tensor, since when, and the remedy."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.config import RUN_WIDE, MoreThan, OnlyWith, StageConfig


class OutlierConfig(StageConfig):
    """How closely models are audited for what quantization would break, and how much of it the report lists."""

    sigmas: float = Field(default=6.0, gt=0)
    """A value further from the tensor's mean than this many standard deviations is counted as an outlier."""
    large_gain: float = Field(default=100.0, gt=1)
    """A norm whose largest gain (the value that multiplies) reaches this is named in the verdict."""
    top: int = Field(default=15, ge=1, le=1000)
    """Rows in each of the report's tables; `weights.json` always has every tensor."""
    sample_values: int = Field(default=32_768, ge=0)
    """Values of each matrix on which the error of each format is measured, in rows spread over it; 0 for none."""
    focus: str = "student"
    """The model to deliver, for which an importance matrix is written; the last one where none has this name."""
    calibration_rows: int = Field(default=128, ge=0)
    """Rows on which activations are measured, of `calibration.jsonl` or else `train.jsonl`; 0 for weights alone."""
    max_length: Annotated[int, RUN_WIDE] = Field(default=2048, ge=16)
    """Longer calibration rows are cut to this many tokens."""
    measure: Annotated[Literal["focus", "all", "none"], OnlyWith("calibration_rows", MoreThan(0))] = "focus"
    """Which models are tried on held-out rows: in float16, rescaled, clipped, 8-bit activations, AWQ's fold."""
    measured_rows: Annotated[int, OnlyWith("measure", ("focus", "all"))] = Field(default=16, ge=1)
    """Held-out rows of each trial."""
    margin: Annotated[float, OnlyWith("calibration_rows", MoreThan(0))] = Field(default=2.0, ge=1)
    """Factor by which the largest activation must stay below a limit to be safe: other rows may reach higher."""
    clip_percentile: Annotated[float, OnlyWith("measure", ("focus", "all"))] = Field(default=99.0, gt=0, le=100)
    """Percentile at which the clipping trial limits a norm's gains."""
