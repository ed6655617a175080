"""Gemma and the models built on it: pre-norm blocks, norms stored as gain - 1."""

from tasks.engine.models.families.family import PRE_NORM_WRITERS, Family
from tasks.engine.models.families.gemma_turns import GEMMA_TURNS

GEMMA = Family(
    name="Gemma",
    model_types=("gemma",),
    norms_are_gain_minus_1=True,
    residual_writers=PRE_NORM_WRITERS,
    chat_template=GEMMA_TURNS,
)
GEMMA_RELATIVES = Family(
    name="Gemma's relatives",
    model_types=("recurrent_gemma", "t5gemma", "t5gemma2", "vaultgemma", "paligemma"),
    norms_are_gain_minus_1=True,
)
