"""GGUF: converts a model directory to a file for llama.cpp, and compares it there with the model before delivery."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.core.config import OnlyWith, StageConfig
from tasks.core.named_choice import NameIn
from tasks.engine.runtimes.ggml_types import TYPES
from tasks.gguf.kinds import KINDS

Kind = Annotated[str, NameIn(KINDS, "auto")]
Type = Annotated[str, NameIn(TYPES)]


class GgufConfig(StageConfig):
    """Kind of the GGUF, and how far its logits may be from the model's."""

    kind: Kind = "Q8_0"
    """llama.cpp's file type (docs/gguf.md lists them). Tensors whose rows do not fill its blocks of 256 get another
    type: see the conversion plan. `auto` is the largest kind that fits `budget_mb`, or the smallest that keeps
    `max_mean_kl` and `min_top1`."""
    budget_mb: float | None = Field(default=None, gt=0)
    """Largest file, in megabytes (10^6 bytes). With a given kind a larger plan fails before anything is written."""
    embedding_type: Type | None = None
    """Type of the token embedding (and Gemma 3n's per-layer embeddings); none leaves it to the kind."""
    output_type: Type | None = None
    """Type of the output matrix, which in a model with tied embeddings is the embedding."""
    overrides: dict[str, Type] = {}
    """Types of single tensors: a regular expression that is searched in llama.cpp's tensor names, and a type. The
    first that matches wins: `{"ffn_down": "Q6_K", "blk\\\\.0\\\\.": "Q8_0"}`."""
    sensitive: Literal["recommend", "raise"] = "recommend"
    """For tensors that the outliers stage's verdict calls sensitive, name better types in the plan, or write them."""
    sensitive_percent: Annotated[float, OnlyWith("budget_mb", (None,))] = Field(default=5.0, ge=0, le=100)
    """How much larger better types for sensitive tensors may make the file, where there is no `budget_mb`."""
    imatrix: bool = True
    """Weigh rounding errors by the outliers stage's importance matrix, if there is one; Q8_0 and floats ignore it."""
    name: str = Field(default="stillhouse", min_length=1)
    """`general.name` in the file's metadata, which servers show."""
    proof_rows: int = Field(default=32, ge=1)
    """Held-out rows on which llama.cpp with this file is compared with the model in float32."""
    max_mean_kl: float | None = Field(default=None, gt=0)
    """Largest mean KL divergence in nats per answer token; none means the kind's default (Q8_0 0.02, Q4_0 0.6)."""
    min_top1: float | None = Field(default=None, ge=0, le=1)
    """Smallest fraction of answer tokens with the same most likely token; none means the kind's default."""
    context: int = Field(default=2048, ge=256)
    """Context length, prompt and answer together, in the files for Ollama and llama-server."""

    @model_validator(mode="after")
    def _check_auto_budget(self) -> Self:
        if self.kind == "auto" and self.budget_mb is None and self.max_mean_kl is None:
            raise ValueError("kind auto needs a budget: set budget_mb (size), or max_mean_kl and min_top1 (quality)")
        return self
