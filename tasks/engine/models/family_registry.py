"""Every model family: each module of `families` is one, and holds it as `FAMILY`. torch is not imported.

family_of("gemma3_text").gain_offset("model.layers.0.input_layernorm.weight")     # 1.0

To add one, add a module there: loading, norms, merging, the memory plan and GGUF files derive from it.
"""

import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType

from tasks.core.errors import BadConfig
from tasks.engine.models import families
from tasks.engine.models.family import GENERIC, ChatTemplate, Family


def discover(package: ModuleType) -> list[Family]:
    """The families of a package's modules. Raises ValueError where two list one model type."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    listed: list[Family] = [importlib.import_module(f"{package.__name__}.{name}").FAMILY for name in names]
    kinds = [kind for family in listed for kind in family.model_types]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{package.__name__}: two families list one model type: {', '.join(sorted(kinds))}")
    return listed


FAMILIES = discover(families)


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
