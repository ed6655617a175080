"""The table of model families, and which of them a model belongs to. torch is not imported.

family_of("gemma3_text").gain_offset("model.layers.0.input_layernorm.weight")     # 1.0

A new family is a file with one `Family` and its entry in `FAMILIES`. The table is written out, because a stage's cache
key follows import statements: a family that is found by looking into the folder would change results unseen.
"""

import json
from pathlib import Path

from tasks.core.errors import BadConfig
from tasks.engine.models.families.family import GENERIC, ChatTemplate, Family
from tasks.engine.models.families.gemma import GEMMA, GEMMA_RELATIVES
from tasks.engine.models.families.gemma2 import GEMMA2
from tasks.engine.models.families.gemma3 import GEMMA3
from tasks.engine.models.families.gemma3n import GEMMA3N
from tasks.engine.models.families.llama import LLAMA
from tasks.engine.models.families.nemotron import NEMOTRON
from tasks.engine.models.families.qwen import QWEN, QWEN3_NEXT

FAMILIES = [GEMMA, GEMMA_RELATIVES, GEMMA2, GEMMA3, GEMMA3N, LLAMA, QWEN, QWEN3_NEXT, NEMOTRON]


def family_of(model_type: str) -> Family:
    """The family that lists `model_type`; `GENERIC` where none does."""
    return next((family for family in FAMILIES if model_type in family.model_types), GENERIC)


def family_in(base: Path) -> Family:
    """The family of a model directory, from its config.json."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return family_of(str(config.get("model_type")))


def model_types(attribute: str) -> list[str]:
    """The model types of all families of which `attribute` is true, for messages."""
    return [kind for family in FAMILIES if getattr(family, attribute) for kind in family.model_types]


def chat_template(name: str) -> ChatTemplate:
    """The chat template that a family brings under `name`. Raises BadConfig for an unknown one."""
    templates = {family.chat_template.name: family.chat_template for family in FAMILIES if family.chat_template}
    if name not in templates:
        raise BadConfig(f"chat_template={name!r} is none of model, {', '.join(templates)}")
    return templates[name]
