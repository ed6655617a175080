"""The base of every stage's config: frozen, flat, unknown keys refused, docstrings under fields become help."""

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """A stage's settings. Every field changes the stage's output, and so its cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
