"""Llama and Mistral: pre-norm blocks, norms that multiply by the stored weight."""

from tasks.engine.models.family import PRE_NORM_WRITERS, Family

FAMILY = Family(name="Llama", model_types=("llama", "mistral"), residual_writers=PRE_NORM_WRITERS)
