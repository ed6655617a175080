"""Qwen3-Next and Qwen 3.5: norms stored as gain - 1, but for the gated one of linear attention."""

from tasks.engine.models.family import Family

FAMILY = Family(
    name="Qwen3-Next",
    model_types=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    norms_are_gain_minus_1=True,
    plain_norms=r"(vision|audio)_(tower|model)|\bvisual\.|linear_attn\.norm",
)
