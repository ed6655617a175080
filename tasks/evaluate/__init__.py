"""Evaluate: how good a model's answers are on the held-out rows, and how fast they come. This is the stage's config."""

from pydantic import Field

from tasks.core.config import StageConfig


class EvaluateConfig(StageConfig):
    """How a model, or its GGUF file in llama.cpp, is asked and scored. Answers are greedy."""

    max_new_tokens: int = Field(default=160, ge=1)
    """An answer that has not ended after so many tokens is cut there, and scored as it is."""

    batch_size: int = Field(default=64, ge=1)
    """Rows that are answered at the same time (in llama.cpp: parallel slots)."""

    limit_rows: int | None = Field(default=None, ge=1)
    """Ask only so many of the held-out rows, spread evenly over the file."""

    out_of_scope_intent: str = "out_of_scope"
    """The intent of questions that the model should decline."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads; by default half of the CPUs, for threads that wait for each other on a busy machine are slow."""

    warmup_rows: int = Field(default=4, ge=0)
    """Rows answered once before the clock starts, so that tokens_per_second leaves out what happens only once."""

    mistakes: int = Field(default=20, ge=0)
    """Wrong answers shown in the report."""
