"""Gemma 2: sandwich norms, capped attention scores and logits, every other layer with full attention."""

from tasks.engine.models.families.gemma import GEMMA_TURNS
from tasks.engine.models.family import SANDWICH_WRITERS, Family

FAMILY = Family(
    name="Gemma 2",
    model_types=("gemma2",),
    norms_are_gain_minus_1=True,
    residual_writers=SANDWICH_WRITERS,
    chat_template=GEMMA_TURNS,
    gguf_global_layer_period=2,
)
