"""The base of every stage's config: frozen, flat, unknown keys refused, docstrings under fields become help.

max_length: Annotated[int, RUN_WIDE] = Field(2048, ge=16)      # one value for all stages of a flow
near_threshold: Annotated[float, OnlyWith("near_duplicates", ("together", "drop"))] = 0.8
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class RunWide:
    """Type of `RUN_WIDE`."""


RUN_WIDE = RunWide()
"""Marks a setting of a stage that a flow has once for all its stages (`flows.config.FlowConfig`)."""


@dataclass(frozen=True)
class MoreThan:
    """Numbers above a bound, as `OnlyWith` tests them."""

    bound: float

    def __contains__(self, value: Any) -> bool:
        return bool(value > self.bound)


@dataclass(frozen=True)
class OnlyWith:
    """Marks a setting that has an effect only while the setting `field` of the same config has one of `values`."""

    field: str
    values: tuple[Any, ...] | MoreThan

    @property
    def condition(self) -> str:
        """`method: lora or qlora`."""
        if isinstance(self.values, MoreThan):
            return f"{self.field} above {self.values.bound:g}"
        return f"{self.field}: {' or '.join(shown(value) for value in self.values)}"


def shown(value: object) -> str:
    """A setting's value as YAML writes it."""
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


class StageConfig(BaseModel):
    """A stage's settings. Every field changes the stage's output, and so its cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of a flow's form, where a run-wide setting stands at the top and not in each stage's group."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name in run_wide(cls):
            properties.pop(name, None)
        return schema


def run_wide(config: type[BaseModel]) -> set[str]:
    """Names of a config's settings that are one for the whole run."""
    return {name for name, field in config.model_fields.items() if RUN_WIDE in field.metadata}


def conditions(field: FieldInfo) -> Iterator[OnlyWith]:
    """What a field needs of others to have an effect."""
    yield from (mark for mark in field.metadata if isinstance(mark, OnlyWith))


def idle_settings(config: BaseModel, default: BaseModel) -> Iterator[tuple[str, OnlyWith]]:
    """Settings that differ from `default` and have no effect, each with the condition that is not met."""
    for name, field in type(config).model_fields.items():
        if getattr(config, name) != getattr(default, name):
            unmet = (mark for mark in conditions(field) if getattr(config, mark.field) not in mark.values)
            yield from ((name, mark) for mark in unmet)
