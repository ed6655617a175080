"""Shows a child's events: a bar in the terminal, a progress artifact and log lines in Prefect."""

import sys
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tasks.core.plain_text import visible

ARTIFACT_SECONDS = 5.0
LINE_SECONDS = 15.0


class ProgressView:
    """Shows one stage's progress; a context manager, so that the bar is gone when the stage ends."""

    def __init__(self, stage: str, logger: Any) -> None:
        self._stage, self._logger = stage, logger
        self._artifact: UUID | None = None
        self._published = time.monotonic() - ARTIFACT_SECONDS + 1.0  # a stage of less than a second gets no artifact
        self._logged = time.monotonic()
        description, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
        columns = description, BarColumn(), MofNCompleteColumn(), note
        self._bar = Progress(
            *columns, TimeElapsedColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
        )
        self._task = self._bar.add_task(stage, total=None, note="")

    def __enter__(self) -> "ProgressView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Shows a `progress` or `log` event of `tasks.core.job.Job`."""
        if event["event"] == "log":
            self._logger.log(
                30 if event["level"] == "warning" else 20, "%s: %s", self._stage, visible(event["message"])
            )
        elif event["event"] == "progress":
            self.progress(event["done"], event["total"], event["unit"], event["note"])

    def progress(self, completed: float, total: float, unit: str, note: str = "") -> None:
        """Shows progress, with the arguments of `Job.progress`; the store calls it too."""
        total, note = max(total, 1e-9), visible(f"{unit}  {note}")
        self._bar.update(self._task, completed=completed, total=total, note=note)
        clock, last = time.monotonic(), completed >= total
        if clock - self._published > ARTIFACT_SECONDS or (last and self._artifact):
            self._published = clock
            self._publish(100.0 * min(completed / total, 1.0))
        if self._bar.disable and clock - self._logged > LINE_SECONDS:
            self._logged = clock
            self._logger.info("%s: %.0f/%.0f %s", self._stage, completed, total, note)

    def _publish(self, percent: float) -> None:
        if self._artifact is None:
            key = f"progress-{self._stage}".lower().replace("_", "-").replace(" ", "-")
            artifact = create_progress_artifact(percent, key=key, description=f"Progress of {self._stage}")
            self._artifact = artifact if isinstance(artifact, UUID) else None
        else:
            update_progress_artifact(self._artifact, percent)
