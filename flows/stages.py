"""Runs a flow's tasks one after the other, remembers how each went, and opens and ends the flow's MLflow run."""

import io
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from prefect import Task, get_run_logger
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.runtime import flow_run
from rich.console import Console

from flows.checks import idle
from flows.flow_config import FlowConfig
from flows.preflight import preflight, render, require_none_failed
from tasks.core.errors import StageError
from tasks.core.inputs import remove_unused_inputs
from tasks.core.mlflow_run import Run
from tasks.core.settings import Settings
from tasks.core.shell import stage_label
from tasks.core.store import open_store
from tasks.core.tracking import Tracker, tracker

P = ParamSpec("P")
R = TypeVar("R")


class Stages:
    """`run(name, task, *arguments)` calls a task in this process (so that cancelling reaches its child at once)."""

    def __init__(self, config: FlowConfig) -> None:
        self.settings = Settings()
        self.flow_run_id = str(flow_run.get_id())
        self.report = report_directory(self.settings.root, str(flow_run.get_name()), self.flow_run_id)
        self.records: list[dict[str, Any]] = []
        self.warnings = idle(config)
        self._config = config

    def __enter__(self) -> Self:
        remove_unused_inputs(self.settings)
        open_store(self.settings.store_uri).check()
        logger = get_run_logger()
        for warning in self.warnings:
            logger.warning(warning)
        self._preflight(logger)
        self.tracker: Tracker = tracker(self.settings, logger.warning)
        self.tracker.end_dead_runs()
        self.mlflow: Run = self.tracker.flow()
        self._ending = self.tracker.ending(self.mlflow)
        self._ending.__enter__()
        self.mlflow.params(flat(self._config.model_dump(mode="json")))
        link = self.tracker.link(self.mlflow)
        if link:
            create_link_artifact(link, link_text="This run in MLflow", key="mlflow-run")
        return self

    def _preflight(self, logger: Any) -> None:
        """Checks the run before its first stage; raises BadConfig with every failed check and its remedy."""
        if self.settings.preflight == "off":
            return
        checks = preflight(self._config, self.settings)
        text = Console(file=io.StringIO(), width=110, record=True)
        render(checks, text)
        logger.info("%s", text.export_text())
        rows = [check._asdict() for check in checks]
        create_table_artifact(rows, key="preflight", description="What was checked before the run")
        if self.settings.preflight == "stop":
            require_none_failed(checks)

    def __call__(self, name: str, task: "Task[P, R]", *arguments: P.args, **options: P.kwargs) -> R:
        """The task's result; its name, seconds and whether it came from the cache are kept in `records`."""
        start = time.monotonic()
        with stage_label(name):
            state = task(*arguments, return_state=True, **options)
        seconds = round(time.monotonic() - start, 3)
        self.records.append({"name": name, "seconds": seconds, "cached": state.name == "Cached"})
        return state.result()  # raises what the task raised

    def attempt(self, name: str, task: "Task[P, R]", *arguments: P.args, **options: P.kwargs) -> R | StageError:
        """As a call, but a stage's failure is returned instead of raised: a report can be written before it is."""
        try:
            return self(name, task, *arguments, **options)
        except StageError as error:
            return error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.__exit__(kind, error, trace)


def report_directory(home: Path, name: str, flow_run_id: str) -> Path:
    """`<home>/reports/<name>`, and never elsewhere: whoever starts a run may name it `../store`, or `latest`."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:100]
    return home / "reports" / (safe if safe and safe != "latest" else flow_run_id)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as MLflow params: `teacher.rank = 32`."""
    params: dict[str, Any] = {}
    for name, value in values.items():
        params |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return params
