"""GGUF: a model directory becomes one file for llama.cpp, loaded there and compared before it is published."""

from typing import Literal

from pydantic import Field

from tasks.core.config import StageConfig

Kind = Literal[
    "F32", "F16", "BF16",
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS",
]  # fmt: skip


class GgufConfig(StageConfig):
    """Which GGUF is made, and how far it may part from the model."""

    kind: Kind = "Q8_0"
    """llama.cpp's file type. K-quants fall back tensor by tensor where rows are no multiple of 256: see the plan."""
    name: str = Field(default="stillhouse", min_length=1)
    """`general.name` in the file's metadata, which servers show."""
    proof_rows: int = Field(default=32, ge=1)
    """Held-out rows on which llama.cpp with this file is compared with the model in float32."""
    max_mean_kl: float | None = Field(default=None, gt=0)
    """Largest mean KL divergence in nats an answer token; none means the kind's own budget (Q8_0 0.02, Q4_0 0.6)."""
    min_top1: float | None = Field(default=None, ge=0, le=1)
    """Smallest fraction of answer tokens with the same most likely token; none means the kind's own budget."""
