"""Every divergence by name: each module of `divergences` is one, and holds it as `DIVERGENCE`.

To add one, add a module there; config, form, documentation and tests derive from this table. Imports no torch.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType

from tasks.engine.losses import divergences
from tasks.engine.losses.divergence import Divergence, Parameter

DEFAULT = "forward_kl"


def discover(package: ModuleType) -> dict[str, Divergence]:
    """The divergences of a package's modules by name, the default first. Raises ValueError where two clash."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    listed: list[Divergence] = sorted((module.DIVERGENCE for module in modules), key=lambda d: d.name != DEFAULT)
    registry = {divergence.name: divergence for divergence in listed}
    if len(registry) < len(listed):
        raise ValueError(f"{package.__name__}: two modules define one name: {', '.join(d.name for d in listed)}")
    return registry


def parameter_settings(registry: Mapping[str, Divergence]) -> dict[str, Parameter]:
    """The parameters of all divergences by config field; several may share one. Raises ValueError where they differ."""
    settings: dict[str, Parameter] = {}
    for divergence in registry.values():
        for parameter in divergence.parameters.values():
            if settings.setdefault(parameter.setting, parameter) != parameter:
                raise ValueError(f"two divergences define the config field {parameter.setting} differently")
    return settings


def markdown_table(registry: Mapping[str, Divergence]) -> str:
    """The divergences as the table of docs/distillation.md."""
    lines = ["| `divergence` | D(p, q), p the teacher, q the student | source |", "|---|---|---|"]
    for divergence in registry.values():
        settings = ", ".join(f"{name} = `{p.setting}`" for name, p in divergence.parameters.items())
        formula = f"{divergence.formula}; {settings}" if settings else divergence.formula
        lines.append(f"| `{divergence.name}` | {divergence.title}: {formula} | {divergence.source} |")
    return "\n".join(lines)


DIVERGENCES = discover(divergences)
