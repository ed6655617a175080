"""Runs the teacher once over a dataset and caches its hidden states (or top-k logits) of every answer token."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.config import RUN_WIDE, StageConfig

TeacherPrecision = Literal["auto", "bfloat16", "float16", "float32", "8bit", "4bit"]
# A cache holds the log-sum-exp of the teacher's logits / T for these T: a top k has no other trace of its tail.
TEMPERATURES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0)


class TeacherCacheConfig(StageConfig):
    """Settings of the teacher cache. The loss has none here: every temperature and divergence reads the same cache."""

    max_length: Annotated[int, RUN_WIDE] = Field(2048, ge=16)
    """Longest row in tokens; longer ones are left out."""
    chat_template: Annotated[Literal["model", "gemma"], RUN_WIDE] = "model"
    """The teacher's own chat template, or Gemma's turns."""
    teacher_precision: TeacherPrecision = "auto"
    """The teacher's dtype; `8bit` and `4bit` quantize its weights (bitsandbytes, CUDA only)."""
    clip_norms: float | None = Field(None, gt=0, lt=1)
    """Clip the teacher's norm weights at this quantile of their absolute values first. An ablation: it harms."""
    batch_tokens: int = Field(16384, ge=64)
    """Tokens that go through the teacher at once."""
    states_budget_gib: float = Field(64, ge=0)
    """Above this many GiB of hidden states, only the `top_k` largest logits and the mass of the others are cached."""
    top_k: int = Field(64, ge=1, le=4096)
    """How many logits of a position are cached above the budget."""
