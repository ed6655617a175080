"""Merge: writes base and adapter as one model directory in Hugging Face's layout and compares the two."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.config import OnlyWith, StageConfig


class MergeConfig(StageConfig):
    """How a merged model is written, and how far its answers may differ from those of base and adapter."""

    weight: float = 1.0
    """Factor of the adapter's change: 0.5 goes half the way from the base."""
    remedy: Literal["none", "rescale", "clip"] = "none"
    """Against activations too large for float16: `rescale` shrinks the residual stream and leaves the function alone;
    `clip` limits the norms' gains, which changes it, and is there to show the difference."""
    rescale_k: Annotated[float, OnlyWith("remedy", ("rescale",))] = Field(default=0.03125, gt=0)
    """What `rescale` multiplies the residual stream by: a power of two."""
    clip_percentile: Annotated[float, OnlyWith("remedy", ("clip",))] = Field(default=99.0, gt=50, le=100)
    """Where `clip` cuts: the percentile of each norm's gains."""
    shard_bytes: int = Field(default=1_900_000_000, ge=100_000, lt=2_000_000_000)
    """Largest safetensors file, in bytes. Some object stores and file systems end at 2 GB."""
    gate_rows: int = Field(default=64, ge=1)
    """Held-out rows on which the unmerged and the merged model are compared."""
    max_mean_kl: float = Field(default=0.01, gt=0)
    """Largest mean KL divergence, in nats an answer token. Rounding to bfloat16 costs about 0.0001."""
    min_top1: float = Field(default=0.97, ge=0, le=1)
    """Smallest fraction of answer tokens whose most likely token is the same."""
