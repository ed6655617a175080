"""The base of every flow's single parameter: one value for what all stages share, groups of settings, presets.

    config = PipelineConfig.load(Path("my.yaml"))       # ValueError with the field, the reason and the remedy

A group is a field whose type is a stage's config. Settings marked `RUN_WIDE` there (`max_length`, ...) are fields of
the flow, which hands them to every group and refuses them inside one.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails

from flows.presets import preset_names, read_preset
from tasks.core.config import StageConfig, run_wide


class FlowConfig(BaseModel):
    """A flow's single parameter: unknown settings are refused, docstrings are the help of its form."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True,
        field_title_generator=lambda name, _: name.replace("_", " ").title(),  # else a group is called by its class
    )  # fmt: skip

    preset: str | None = None
    """Settings to start from, by the name of a file in `deployments/presets`; what is set here goes before them. In the
    form that is every field that shows a value; a group left at None is the preset's."""
    max_length: int = Field(2048, ge=16)
    """Longest row in tokens, chat template included; `ingest.over_long` says what happens to longer ones."""
    chat_template: Literal["model", "gemma"] = "model"
    """The model's own chat template, or Gemma's turns for a base model that has none."""
    out_of_scope_intent: str = "out_of_scope"
    """The intent of questions that the model should decline, in answers that are JSON objects with an `intent`."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """A config from YAML. Raises ValueError that names the field and the file."""
        try:
            values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        return cls.checked(values, str(path))

    @classmethod
    def checked(cls, values: Any, source: str) -> Self:
        """A config from plain values. Raises ValueError that names the field and the `source`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [(problem["loc"], cls._reason(problem)) for problem in error.errors()]
            shared = FlowConfig.model_fields  # a wrong one is named once, not for every stage that it is handed to
            problems = [(loc, text) for loc, text in problems if len(loc) < 2 or loc[-1] not in shared]
            lines = (f"  {'.'.join(map(str, loc))}: {text}" if loc else f"  {text}" for loc, text in problems)
            raise ValueError(f"{source} has settings that do not fit:\n" + "\n".join(lines)) from error

    @classmethod
    def _reason(cls, problem: ErrorDetails) -> str:
        """A validation problem in words; of an unknown setting, the name that may have been meant."""
        if problem["type"] != "extra_forbidden":
            return problem["msg"].removeprefix("Value error, ")
        *path, name = problem["loc"]
        fields = {**cls.groups(), **cls.lists()}[str(path[0])].model_fields if path else cls.model_fields
        nearest = get_close_matches(str(name), fields, 1)
        return "there is no such setting" + (f"; did you mean {nearest[0]}?" if nearest else "")

    @classmethod
    def groups(cls) -> dict[str, type[StageConfig]]:
        """The stages' configs among the fields."""
        return {name: kind for name, field in cls.model_fields.items() if (kind := _stage_config(field.annotation))}

    @classmethod
    def lists(cls) -> dict[str, type[StageConfig]]:
        """Fields that are lists of a stage's configs: the stage runs once for each."""
        return {
            name: kind
            for name, field in cls.model_fields.items()
            if get_origin(field.annotation) is list and (kind := _stage_config(get_args(field.annotation)[0]))
        }

    @classmethod
    def default(cls, field: str) -> Any:
        """A field's value in this flow when nothing is set."""
        return cls.model_fields[field].get_default(call_default_factory=True)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Merges the preset, the groups' defaults and the run-wide settings into what was set."""
        if not isinstance(values, Mapping):
            return values
        settings = cls._merged(values)
        shared = {name: settings.get(name, cls.default(name)) for name in FlowConfig.model_fields}
        for name, kind in cls.groups().items():
            settings[name] = _filled(name, kind, settings.get(name, {}), cls.default(name), shared)
        for name, kind in cls.lists().items():
            items = settings.get(name, cls.default(name))
            if isinstance(items, Sequence):
                settings[name] = [_filled(name, kind, item, None, shared) for item in items]
        return settings

    @classmethod
    def _merged(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The preset's values with these on top: groups setting by setting, anything else as a whole."""
        preset = values.get("preset")
        settings: dict[str, Any] = read_preset(preset) if preset else {}
        for name, value in values.items():
            below = settings.get(name)
            if name not in cls.groups():
                settings[name] = value
            elif value is not None:  # null is an untouched group of the form
                settings[name] = {**below, **_set(value)} if isinstance(below, Mapping) else value
        return settings

    @model_serializer(mode="wrap")
    def _without_repetitions(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The values as they can be read again: run-wide settings at the top only."""
        values: dict[str, Any] = handler(self)
        for name, kind in {**self.groups(), **self.lists()}.items():
            for group in [values[name]] if isinstance(values.get(name), dict) else values.get(name, []):
                for key in run_wide(kind):
                    group.pop(key, None)
        return values

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The form: what a person fills in first, what all stages share, then groups, which are closed until opened."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name in cls.groups():
            group = properties[name]
            reference = {"$ref": group["$ref"]}
            inside = handler.resolve_ref_schema(reference)
            inside["title"] = "change"  # the button that opens the group
            for key, value in cls.default(name).model_dump(mode="json", exclude_unset=True).items():
                inside["properties"][key]["default"] = value
            properties[name] = {
                "anyOf": [reference, {"type": "null"}], "default": None,
                "title": group["title"], "description": group.get("description", inside["description"]),
            }  # fmt: skip
        for name, kind in cls.lists().items():
            short = next(iter(kind.model_fields))
            reference = properties[name]["items"]
            choice = handler.resolve_ref_schema(reference)["properties"][short]
            names = {"enum": choice["enum"], "type": "string"}
            bounds = {"minItems": properties[name].pop("minItems", 0), "type": properties[name].pop("type")}
            del properties[name]["items"]
            properties[name]["anyOf"] = [
                {"title": f"{short}s", "items": names, **bounds},
                {"title": "with settings", "items": {"anyOf": [reference, names]}, **bounds},
            ]
            properties[name]["default"] = [
                next(iter(values.values())) if len(values) == 1 else values
                for values in (item.model_dump(mode="json", exclude_unset=True) for item in cls.default(name))
            ]
        properties["preset"]["anyOf"][0]["enum"] = cls.preset_names()
        ordered = {name: properties[name] for name in cls.form_order()}
        properties.clear()
        properties.update(ordered)
        return schema

    @classmethod
    def preset_names(cls) -> list[str]:
        """Presets whose settings are all of this flow."""
        return [name for name in preset_names() if read_preset(name).keys() <= cls.model_fields.keys()]

    def unused_groups(self) -> dict[str, str]:
        """Groups that this run does not read, with the reason and the remedy."""
        return {}

    @classmethod
    def form_order(cls) -> list[str]:
        """Fields as a person meets them: the flow's own, what all stages share, groups."""
        groups = cls.groups()
        flow_fields = [name for name in cls.model_fields if name not in groups and name not in FlowConfig.model_fields]
        return [*flow_fields, *FlowConfig.model_fields, *groups]


def _stage_config(annotation: Any) -> type[StageConfig] | None:
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return kind if isinstance(kind, type) and issubclass(kind, StageConfig) else None


def _set(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, StageConfig) else value


def _filled(name: str, kind: type[StageConfig], value: Any, default: StageConfig | None, shared: dict[str, Any]) -> Any:
    """A group with what the run shares; a bare string stands for the config's first setting (a GGUF kind)."""
    if isinstance(value, str):
        value = {next(iter(kind.model_fields)): value}
    settings = _set(value)
    if not isinstance(settings, Mapping):
        return value
    shared_names = run_wide(kind)
    if misplaced := sorted(shared_names & settings.keys()):
        key = misplaced[0]
        raise ValueError(f"{name}.{key}: set {key} at the top: it is one setting for the whole run")
    defaults = default.model_dump(exclude_unset=True) if default is not None else {}
    return {**defaults, **settings, **{key: shared[key] for key in shared_names}}
