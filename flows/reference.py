"""Writes docs/configuration.md: every setting of every flow with type, default, bounds and help.

stillhouse reference
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.ablation import AblationConfig
from flows.audit import AuditConfig
from flows.bakeoff import BakeoffFlowConfig
from flows.config import PipelineConfig
from flows.flow_config import FlowConfig
from flows.presets import preset_names, preset_text
from flows.quantize import QuantizeConfig
from tasks.core.config import RUN_WIDE, StageConfig, conditions, shown
from tasks.core.named_choice import NameIn

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
FLOWS: dict[str, tuple[str, type[FlowConfig]]] = {
    "pipeline": ("stillhouse run", PipelineConfig),
    "quantize": ("stillhouse quantize", QuantizeConfig),
    "audit": ("stillhouse audit", AuditConfig),
    "bakeoff": ("stillhouse bakeoff", BakeoffFlowConfig),
    "ablation": ("stillhouse ablation", AblationConfig),
}
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
HEAD = """# Configuration

<!-- Written by `stillhouse reference`; a test holds it to the code. -->

A flow reads one YAML file. It names a preset and what differs from it:

```yaml
preset: gemma-3-24gb
train: data/train.jsonl
max_length: 1024
student:
  method: lora
  rank: 32
```

Without a preset the defaults below hold. A preset's group (`student`) is merged with yours setting by setting; anything
else (`gguf`, `revision`) is replaced. An unknown setting is refused by name, and one that another setting makes idle is
warned of when the run starts, in its log and on its page. `max_length`, `chat_template` and `out_of_scope_intent` are
set once, at the top. `stillhouse doctor my.yaml` checks a file without running it. Secrets and endpoints come from the
environment (see `tasks/core/settings.py`), never from here.
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *_presets(), *_flows(), *_stages()]).rstrip() + "\n"


def _presets() -> Iterator[str]:
    yield "## Presets\n\n| preset | for |\n|---|---|"
    for name in preset_names():
        yield f"| [`{name}`](../deployments/presets/{name}.yaml) | {preset_text(name).splitlines()[0].lstrip('# ')} |"
    yield ""


def _flows() -> Iterator[str]:
    for command, config in FLOWS.values():
        groups = config.groups()
        yield f"## {config.model_config['title']}: `{command} my.yaml`\n\n{config.__doc__}\n"
        yield from _table({name: config.model_fields[name] for name in config.form_order() if name not in groups})
        yield "\nGroups:\n"
        for name, group in groups.items():
            help_ = config.model_fields[name].description or _summary(group)
            changes = config.default(name).model_dump(exclude_unset=True)
            differs = ", ".join(f"`{key}: {shown(value)}`" for key, value in changes.items())
            defaults_of_flow = f" Here by default {differs}." if differs else ""
            link = f"[{group.__name__}](#{group.__name__.lower()})"
            yield f"- `{name}`: {_line(help_)}{defaults_of_flow} Settings: {link}"
        yield ""


def _stages() -> Iterator[str]:
    yield "## Groups of settings\n"
    stages: dict[type[StageConfig], list[str]] = {}
    for _, config in FLOWS.values():
        for name, group in {**config.groups(), **config.lists()}.items():
            names = stages.setdefault(group, [])
            names.extend([] if name in names else [name])
    for group, names in stages.items():
        yield f"### {group.__name__}\n\n`{'`, `'.join(names)}`: {_line(_summary(group))}\n"
        stage_fields = {name: field for name, field in group.model_fields.items() if RUN_WIDE not in field.metadata}
        yield from _table(stage_fields)
        yield ""


def _summary(config: type[BaseModel]) -> str:
    return (config.__doc__ or "").strip()


def _table(fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield "| setting | type | default | what it does |\n|---|---|---|---|"
    for name, field in fields.items():
        needs = "".join(f" Only with `{mark.condition}`." for mark in conditions(field))
        help_ = _line(field.description or "") + needs
        yield f"| `{name}` | {_escaped(type_of(field))} | {_escaped(_default(field))} | {_escaped(help_)} |"


def type_of(field: FieldInfo) -> str:
    """A field's type and bounds in words: `integer ≥ 1, ≤ 1024`."""
    for mark in field.metadata:
        if isinstance(mark, NameIn):
            return ", ".join(f"`{name}`" for name in mark.names)
    bounds = [f"{sign} {getattr(mark, key):g}" for mark in field.metadata for kind, (key, sign) in BOUNDS.items()
              if isinstance(mark, kind)]  # fmt: skip
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin is Annotated:
        bounds = [f"{sign} {getattr(mark, key):g}" for mark in parts[1:]
                  for kind, (key, sign) in BOUNDS.items() if isinstance(mark, kind)]  # fmt: skip
        return " ".join([_type(parts[0]), *bounds])
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"map of names to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, StageConfig):
        first = next(iter(annotation.model_fields))
        return f"`{first}` or [{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
    return words.get(annotation) or str(annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list) and value and isinstance(value[0], StageConfig):
        firsts = dict.fromkeys(str(getattr(item, next(iter(type(item).model_fields)))) for item in value)
        return ", ".join(f"`{first}`" for first in firsts)
    return f"`{shown(value)}`" if value != "" else ""


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def write() -> Path:
    """Writes the page; returns its path."""
    PAGE.write_text(page(), encoding="utf-8")
    return PAGE


if __name__ == "__main__":
    print(write())
