"""Evaluate: how good a model's answers are on the held-out rows, and how fast they come. This is the stage's config."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.core.config import RUN_WIDE, StageConfig


class EvaluateConfig(StageConfig):
    """How a model, or its GGUF file in llama.cpp, answers the held-out rows and is scored. Decoding is greedy."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """An answer that has not ended after so many tokens is cut there, marked, and scored as it is; by default a quarter
    (16 tokens at least) more than the longest expected answer has."""

    batch_size: int = Field(default=64, ge=1)
    """Rows that are answered at the same time (in llama.cpp: parallel slots)."""

    limit_rows: int | None = Field(default=None, ge=1)
    """Evaluate on only so many of the held-out rows, spread evenly over the file."""

    out_of_scope_intent: Annotated[str, RUN_WIDE] = "out_of_scope"
    """The intent of questions that the model should decline."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads; by default half of the CPUs, for threads that wait for each other on a busy machine are slow."""

    warmup_rows: int = Field(default=4, ge=0)
    """Rows answered once before the clock starts, so that speeds leave out what happens only once."""

    load_in: Literal["original", "int8", "nf4"] = "original"
    """How a Hugging Face model is loaded: as it is stored, or in bitsandbytes' 8 bits, or in 4 (NF4, as QLoRA trains on
    it); a GGUF file is as it is."""

    stop_at_json: bool = False
    """End an answer where it is a complete JSON object, as a client that parses would; else only the model ends it."""

    constrained_rows: int = Field(default=0, ge=0)
    """Rows that are answered a second time with decoding constrained to the JSON schema of the training answers."""

    latency_rows: int = Field(default=16, ge=0)
    """Rows that are answered one at a time, for the time to the first token and to the whole answer."""

    perplexity_rows: int = Field(default=128, ge=0)
    """Held-out rows whose expected answers' perplexity is measured; 0 measures none."""

    text_tokens: int = Field(default=8192, ge=0)
    """Tokens of general text (the `text` input) whose perplexity shows what training and quantization made the model
    forget; 0 measures none."""

    metric: str | None = Field(default=None, pattern=r"^\w+(\.\w+)*:\w+$")
    """A metric of your own, `module:function`: called with (question, expected, answer) for each row, gives a
    number from 0 to 1. The cache does not see its code: rename it when it changes."""

    mistakes: int = Field(default=20, ge=0)
    """Wrong answers shown in the report."""
