"""What a flow's config says about itself before anything runs: settings without effect, and settings that contradict.

A contradiction is refused when the config is read; a setting without effect is warned of when the run starts, in its
log and on its page. What a setting of a stage needs of its neighbours stands beside it (`OnlyWith`); what settings of
different groups need of each other stands here, in `ACROSS`.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from flows.flow_config import FlowConfig
from tasks.core.config import StageConfig, idle_settings, run_wide, shown
from tasks.evaluate import EvaluateConfig
from tasks.gate import GateConfig


class Across(NamedTuple):
    """A setting that has an effect only while another, anywhere in the flow's config, has a value (or has none)."""

    setting: str
    other: str
    needs_value: bool
    remedy: str


ACROSS = (
    Across("ingest.test_fraction", "test", False, "rows are held back for testing only where no test file is given"),
    Across("ingest.validation_fraction", "validation", False, "rows are held back only where no such file is given"),
    Across("evaluate.text_tokens", "text", True, "set text to a file of general text"),
    Across("vocabulary_text", "student.vocabulary", True, "set student.vocabulary to the size to trim to"),
)


def idle(config: FlowConfig) -> list[str]:
    """Every setting that was changed and has no effect, each as a sentence with the reason and the remedy."""
    return [f"{setting} has no effect: {reason}" for setting, reason in _idle(config)]


def _idle(config: FlowConfig) -> Iterator[tuple[str, str]]:
    unused = config.unused_groups()
    for name in config.groups():
        group, default = getattr(config, name), config.default(name)
        if name in unused:
            yield from ((f"{name}.{key}", unused[name]) for key in _changed(group, default))
        else:
            yield from _conditions(name, group, default)
    for name, kind in config.lists().items():
        for item in getattr(config, name):
            yield from _conditions(f"{name} {next(iter(item.model_dump().values()))}", item, kind.model_construct())
    for rule in ACROSS:
        value, other = _value(config, rule.setting), _value(config, rule.other)
        if value not in (None, _default(config, rule.setting)) and (other is not None) != rule.needs_value:
            yield rule.setting, f"{rule.other} is {'not given' if other is None else shown(other)}; {rule.remedy}"


def _conditions(name: str, group: StageConfig, default: StageConfig) -> Iterator[tuple[str, str]]:
    for key, mark in idle_settings(group, default):
        value = shown(getattr(group, mark.field))
        yield f"{name}.{key}", f"{mark.field} is {value}, and it needs {mark.condition}; change that, or remove {key}"


def _changed(group: StageConfig, default: StageConfig) -> list[str]:
    names = type(group).model_fields.keys() - run_wide(type(group))
    return sorted(name for name in names if getattr(group, name) != getattr(default, name))


def _value(config: FlowConfig, path: str) -> Any:
    """The value at `group.field`; None where the flow has no such field."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _default(config: FlowConfig, path: str) -> Any:
    group, _, key = path.rpartition(".")
    if group:
        return getattr(config.default(group), key, None) if group in config.groups() else None
    return config.default(key) if key in type(config).model_fields else None


def require_revisions_of_models(pins: Iterable[str], sources: Iterable[str]) -> None:
    """Raises ValueError for a pinned revision of a model that the run does not use."""
    if unknown := sorted(set(pins) - set(sources)):
        raise ValueError(f"revision: {unknown[0]!r} is none of this run's models ({', '.join(sources)}): correct it")


def require_separate_rows(train: str | None, **evaluation_sources: str | None) -> None:
    """Raises ValueError where rows to learn from are also those to measure on."""
    for split, source in evaluation_sources.items():
        if source is not None and source == train:
            raise ValueError(f"{split}: {source} is also train: give other rows, or leave {split} out")


def require_metric(gate: GateConfig, evaluate: EvaluateConfig) -> None:
    """Raises ValueError for a gate that compares by the user's own metric where none is evaluated."""
    if evaluate.metric is None and (gate.check == "metric" or "metric" in gate.floors):
        raise ValueError("gate: check or floors name `metric`: set evaluate.metric to your module:function")
