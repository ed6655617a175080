"""MLflow from the parent's side: one run a flow run, one nested run a stage, continued on retry and ended truthfully.

The tracking server is a convenience, never a condition: when it does not answer, the pipeline goes on, warns once, and
a later run of the same command records the cached stages with all their numbers.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from tasks.core.errors import Preempted
from tasks.core.mlflow_connection import MlflowConnection, Warn, without_password
from tasks.core.mlflow_run import Run
from tasks.core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLOW_RUN, STAGE, PROCESS = "prefect.flow_run_id", "stillhouse.stage", "stillhouse.process"


def tracker(settings: Settings, warn: Warn) -> "Tracker":
    """The tracker of the current flow run, one a process."""
    from prefect.runtime import flow_run  # noqa: PLC0415

    key = flow_run.get_id() or f"by-hand-{os.getpid()}"
    if key not in _TRACKERS:
        _TRACKERS[key] = Tracker(key, flow_run.get_name() or key, settings, warn)
    return _TRACKERS[key]


_TRACKERS: "dict[str, Tracker]" = {}


class Tracker:
    """The MLflow runs of one flow run."""

    def __init__(self, flow_run_id: str, flow_run_name: str, settings: Settings, warn: Warn) -> None:
        # MLflow's own defaults wait minutes for a server that is not there.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._flow_run_id, self._name, self._settings, self.warn = flow_run_id, flow_run_name, settings, warn
        self._connection = MlflowConnection(settings.tracking_uri, warn)
        self._experiment = self._connection.call(self._find_experiment)
        self._parent: Run | None = None

    def _find_experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        name = self._settings.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return experiment.experiment_id
        sqlite = self._settings.tracking_uri.startswith("sqlite")
        location = (self._settings.root / "mlartifacts").as_uri() if sqlite else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another run created it meanwhile
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return experiment.experiment_id

    def flow(self) -> Run:
        """The parent run of this flow run, found by its tag and continued on a retry."""
        if self._parent is None:
            self._parent = self._open({FLOW_RUN: self._flow_run_id}, self._name, parent=None)
        return self._parent

    def recorded_in(self, digest: str) -> str | None:
        """The id of a run that recorded the artifact `digest`; None when MLflow has none."""

        def search(client: "MlflowClient") -> str | None:
            query = f"tags.digest = '{digest}' and tags.kind != ''"
            runs = client.search_runs([self._experiment], query, max_results=1)
            return str(runs[0].info.run_id) if runs else None

        run_id: str | None = self._connection.call(search)
        return run_id

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """The nested run of a stage, ended as FINISHED, FAILED (an error) or KILLED (stopped from outside)."""
        run = self._open({FLOW_RUN: self._flow_run_id, STAGE: name}, name, parent=self.flow().run_id)
        with self.ending(run):
            yield run

    @contextmanager
    def ending(self, run: Run) -> Iterator[None]:
        """Ends `run` with the status of the block: finished, failed or killed."""
        try:
            yield
        except Exception as error:
            run.tags(error=f"{type(error).__name__}: {error}")
            run.end("KILLED" if isinstance(error, Preempted) else "FAILED")
            raise
        except BaseException:
            run.end("KILLED")
            raise
        run.end("FINISHED")

    def _open(self, tags: dict[str, str], name: str, parent: str | None) -> Run:
        process = f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"
        lineage = {"mlflow.parentRunId": parent} if parent else {}

        def find_or_create(client: "MlflowClient") -> str:
            query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
            runs = client.search_runs([self._experiment], query, max_results=100)
            earlier = [run for run in runs if parent or STAGE not in run.data.tags]
            if earlier:
                run_id = str(earlier[0].info.run_id)
                client.update_run(run_id, status="RUNNING")
                client.set_tag(run_id, PROCESS, process)
                return run_id
            run = client.create_run(self._experiment, tags=tags | lineage | {PROCESS: process}, run_name=name)
            return str(run.info.run_id)

        return Run(self._connection, self._connection.call(find_or_create))

    def link(self, run: Run) -> str | None:
        """The run's address for a browser; for SQLite, while `make mlflow-ui` runs."""
        if run.run_id is None:
            return None
        uri = self._settings.tracking_uri
        server = without_password(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{server}/#/experiments/{self._experiment}/runs/{run.run_id}"

    def end_dead_runs(self) -> None:
        """Ends runs of this host whose process is gone as KILLED."""
        self._connection.call(self._end_dead_runs)

    def _end_dead_runs(self, client: "MlflowClient") -> None:
        for run in client.search_runs([self._experiment], "attributes.status = 'RUNNING'"):
            host, pid, created = run.data.tags.get(PROCESS, "::").rsplit(":", 2)
            if host == socket.gethostname() and not _alive(int(pid), int(created)):
                client.set_terminated(run.info.run_id, "KILLED")


def _alive(pid: int, created: int) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - created) < 2
    except psutil.NoSuchProcess:
        return False
