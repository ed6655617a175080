"""Resolves a training config, once, into the settings that the run uses.

    resolved = resolve(config, method, base, rows, out, job, report)
    resolved.config                    # without `auto`, fitted to the device's memory and to its memory fallback level

What changed, and why, is one block in the log and `settings` in report.json's details.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tasks.core.command import Report
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.memory_fallback import config_at_level, fallback_levels, is_lossless
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.memory.fit import plan_memory
from tasks.engine.memory.teacher_memory import NO_EXTRA, ExtraMemory
from tasks.engine.models.dtypes import pick_device, training_precision
from tasks.engine.models.load_adapter import ignored_settings
from tasks.engine.models.trainable import Method

C = TypeVar("C", bound=TrainingConfig)
ADAPTER_FIELDS = {"rank", "alpha", "use_dora", "target_modules"}  # an earlier adapter keeps its own
LOSSY_FIELDS = (*sorted(ADAPTER_FIELDS), "max_length")  # with these the run makes another model


class Change(NamedTuple):
    """A setting that the run does not use as configured."""

    field: str
    configured: Any
    used: Any
    reason: str


@dataclass
class Resolved(Generic[C]):
    """`config` as the run uses it, and its changes in the order in which they were made."""

    config: C
    changes: list[Change] = field(default_factory=list)

    def update(self, config: C, reason: str) -> None:
        """Replaces the config and records each field that differs."""
        before, after = self.config.model_dump(), config.model_dump()
        changed = [name for name in after if after[name] != before[name]]
        self.changes += [Change(name, before[name], after[name], reason) for name in changed]
        self.config = config

    def block(self) -> str:
        """The changes as lines for the log."""
        lines = [f"  {change.field}: {change.configured} -> {change.used} ({change.reason})" for change in self.changes]
        return "\n".join(["settings that this run does not use as configured:", *lines])


def resolve(
    config: C,
    method: Method,
    base: ModelDir,
    rows: Sequence[Example],
    out: Path,
    job: Job,
    report: Report,
    extra_memory: ExtraMemory = NO_EXTRA,
    required: dict[str, tuple[Any, str]] | None = None,
    lossless_only: bool = False,
) -> Resolved[C]:
    """The settings that the run uses: precision, what an earlier adapter decides, memory plan, memory fallback level.

    `rows` are the training rows that the memory plan measures, `extra_memory` what lies on the device beside the
    trained model, `required` settings that the stage itself fixes, with reasons. `lossless_only` refuses levels that
    change rows or model. Raises BadConfig when nothing fits.
    """
    resolved = Resolved(config)
    precision = training_precision(config.precision, base.base, pick_device())
    resolved.update(config.model_copy(update={"precision": precision}), "the fastest that device and model support")
    report.warnings += ignored_settings(config, base) if method != "full" else []
    planned, memory_plan = plan_memory(resolved.config, method, base, rows, out, job, extra_memory)
    if memory_plan:
        report.details["memory_plan"] = memory_plan.summary()
        resolved.update(planned, f"memory plan for {memory_plan.gib:.1f} GiB, see report/memory_plan.md")
    if job.memory_level:
        if lossless_only:
            lossless = resolved.config.model_copy(update={"allow_quality_loss": False})
            resolved.update(lossless, "this stage keeps rows and model as they are")
        _descend(resolved, method, base, job)
    for name, (value, reason) in (required or {}).items():
        resolved.update(resolved.config.model_copy(update={name: value}), reason)
    if resolved.changes:
        job.log(resolved.block())
        report.details["settings"] = [change._asdict() for change in resolved.changes]
    return resolved


def _descend(resolved: Resolved[C], method: Method, base: ModelDir, job: Job) -> None:
    """Goes down to the job's memory fallback level, each level a tag of the run.

    Raises BadConfig below the last level, and for one that changes only what an earlier adapter decides.
    """
    config, level = resolved.config, job.memory_level
    config_at_level(config, level)
    levels = list(fallback_levels(config))[:level]
    for number, (text, settings) in enumerate(levels, start=1):
        first = len(resolved.changes)
        resolved.update(settings, f"memory fallback level {number}: {text}")
        changed = {change.field for change in resolved.changes[first:]}
        if number == level and base.adapter is not None and method != "full" and changed <= ADAPTER_FIELDS:
            raise BadConfig(
                f"out of memory, and below memory fallback level {level - 1} nothing is left to give up: an earlier "
                f"adapter keeps its rank and modules. Set a smaller max_length (now {settings.max_length}), or train a "
                "new adapter"
            )
        job.tags(**{f"memory_fallback.{number}": text})
    consequence = "resumes from the last checkpoint" if is_lossless(config, level) else "another model: begins anew"
    job.log(f"memory fallback level {level} after out-of-memory errors: {levels[-1][0]}; {consequence}", "warning")
