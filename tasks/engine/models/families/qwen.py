"""Qwen 2 and 3 are built like Llama; Qwen3-Next and Qwen 3.5 store norms as gain - 1, linear attention's excepted."""

from tasks.engine.models.families.family import PRE_NORM_WRITERS, Family

QWEN = Family(name="Qwen", model_types=("qwen2", "qwen3"), residual_writers=PRE_NORM_WRITERS)
QWEN3_NEXT = Family(
    name="Qwen3-Next",
    model_types=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    norms_are_gain_minus_1=True,
    plain_norms=r"(vision|audio)_(tower|model)|\bvisual\.|linear_attn\.norm",
)
