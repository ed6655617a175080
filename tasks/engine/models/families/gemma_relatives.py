"""Models built on Gemma's blocks whose residual stream is not known here: their norms are stored as gain - 1."""

from tasks.engine.models.family import Family

FAMILY = Family(
    name="Gemma's relatives",
    model_types=("recurrent_gemma", "t5gemma", "t5gemma2", "vaultgemma", "paligemma"),
    norms_are_gain_minus_1=True,
)
