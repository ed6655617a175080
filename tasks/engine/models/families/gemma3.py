"""Gemma 3: sandwich norms, norms of queries and keys, five layers with a window to one with full attention."""

from tasks.engine.models.families.gemma import GEMMA_TURNS
from tasks.engine.models.family import SANDWICH_WRITERS, Family

FAMILY = Family(
    name="Gemma 3",
    model_types=("gemma3", "gemma3_text"),
    norms_are_gain_minus_1=True,
    residual_writers=SANDWICH_WRITERS,
    towers=("vision_tower", "multi_modal_projector"),
    chat_template=GEMMA_TURNS,
    handwritten_layers=True,
    trimmable_vocabulary=("gemma3_text",),
    gguf_architectures={"gemma3_text": "gemma3"},
    gguf_quantizes_every_matrix=True,
    gguf_global_layer_period=6,
)
