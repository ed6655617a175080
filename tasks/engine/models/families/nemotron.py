"""Nemotron: LayerNorm stored as gain - 1."""

from tasks.engine.models.families.family import Family

NEMOTRON = Family(name="Nemotron", model_types=("nemotron",), norms_are_gain_minus_1=True)
