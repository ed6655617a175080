"""What a child's events look like to people: a bar in the terminal, a progress artifact and log lines in Prefect."""

import sys
import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ARTIFACT_SECONDS = 5.0
LINE_SECONDS = 15.0


class ProgressView:
    """Shows one stage's progress; a context manager, so that the bar is gone when the stage ends."""

    def __init__(self, stage: str, logger: Any) -> None:
        self._stage, self._logger = stage, logger
        self._artifact: UUID | None = None
        self._shown = time.monotonic() - ARTIFACT_SECONDS + 1.0  # what is done within a second needs no artifact
        self._line = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
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
        """A `progress` or `log` event of `tasks.core.job.Job`."""
        if event["event"] == "log":
            self._logger.log(30 if event["level"] == "warning" else 20, "%s: %s", self._stage, event["message"])
        elif event["event"] == "progress":
            self.progress(event["done"], event["total"], event["unit"], event["note"])

    def progress(self, done: float, total: float, unit: str, note: str = "") -> None:
        """As `Job.progress`; the store's too."""
        total, note = max(total, 1e-9), f"{unit}  {note}"
        self._bar.update(self._task, completed=done, total=total, note=note)
        now, last = time.monotonic(), done >= total
        if now - self._shown > ARTIFACT_SECONDS or (last and self._artifact):
            self._shown = now
            self._publish(100.0 * min(done / total, 1.0))
        if self._bar.disable and now - self._line > LINE_SECONDS:
            self._line = now
            self._logger.info("%s: %.0f/%.0f %s", self._stage, done, total, note)

    def _publish(self, percent: float) -> None:
        if self._artifact is None:
            key = f"progress-{self._stage}".lower().replace("_", "-").replace(" ", "-")
            made = create_progress_artifact(percent, key=key, description=f"Progress of {self._stage}")
            self._artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._artifact, percent)
