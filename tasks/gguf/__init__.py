"""GGUF: a model directory becomes one file for llama.cpp, loaded there and compared before it is published."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.core.config import OnlyWith, StageConfig

Kind = Literal[
    "auto", "F32", "F16", "BF16",
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS",
    "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip
Type = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip


class GgufConfig(StageConfig):
    """Which GGUF is made, and how far it may part from the model."""

    kind: Kind = "Q8_0"
    """llama.cpp's file type. Tensors whose rows do not fill its blocks of 256 get another type: see the plan. `auto`
    is the largest kind that fits `budget_mb`, or the smallest that keeps `max_mean_kl` and `min_top1`."""
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
    """What is done with the tensors that the outliers stage's verdict calls sensitive: the plan names better types for
    them, or the file gets these."""
    sensitive_percent: Annotated[float, OnlyWith("budget_mb", (None,))] = Field(default=5.0, ge=0, le=100)
    """How much larger better types for sensitive tensors may make the file, where `budget_mb` does not say it."""
    imatrix: bool = True
    """Weigh rounding errors by the importance matrix when the outliers stage made one; Q8_0 and floats ignore it."""
    name: str = Field(default="stillhouse", min_length=1)
    """`general.name` in the file's metadata, which servers show."""
    proof_rows: int = Field(default=32, ge=1)
    """Held-out rows on which llama.cpp with this file is compared with the model in float32."""
    max_mean_kl: float | None = Field(default=None, gt=0)
    """Largest mean KL divergence in nats an answer token; none means the kind's own budget (Q8_0 0.02, Q4_0 0.6)."""
    min_top1: float | None = Field(default=None, ge=0, le=1)
    """Smallest fraction of answer tokens with the same most likely token; none means the kind's own budget."""
    context: int = Field(default=2048, ge=256)
    """Tokens of prompt and answer together that the recipes for Ollama and llama-server reserve memory for."""

    @model_validator(mode="after")
    def _auto_has_a_budget(self) -> Self:
        if self.kind == "auto" and self.budget_mb is None and self.max_mean_kl is None:
            raise ValueError("kind auto needs a budget: set budget_mb (size), or max_mean_kl and min_top1 (quality)")
        return self
