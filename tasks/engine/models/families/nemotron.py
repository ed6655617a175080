"""Nemotron: LayerNorm stored as gain - 1."""

from tasks.engine.models.family import Family

FAMILY = Family(name="Nemotron", model_types=("nemotron",), norms_are_gain_minus_1=True)
