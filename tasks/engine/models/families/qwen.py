"""Qwen 2 and 3: built like Llama, some with norms of queries and keys."""

from tasks.engine.models.family import PRE_NORM_WRITERS, Family

FAMILY = Family(name="Qwen", model_types=("qwen2", "qwen3"), residual_writers=PRE_NORM_WRITERS)
