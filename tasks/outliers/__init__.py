"""Outliers: what in a model's weights quantization could break, tensor by tensor, and where it came from."""

from pydantic import Field

from tasks.core.config import StageConfig


class OutlierConfig(StageConfig):
    """What counts as an outlier, and how much of it is shown."""

    sigmas: float = Field(default=6.0, gt=0)
    """A value further from the tensor's mean than this many standard deviations is counted as an outlier."""
    large_gain: float = Field(default=100.0, gt=1)
    """A norm whose largest gain (the value that multiplies) reaches this is named in the verdict."""
    top: int = Field(default=15, ge=1, le=1000)
    """Rows in each of the report's tables; `outliers.json` always has every tensor."""
