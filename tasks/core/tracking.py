"""MLflow from the parent's side: one run a flow run, one nested run a stage, found by tag and ended truthfully.

The tracking server is a convenience, never a condition: when it does not answer, the pipeline goes on, says so once,
and a later run of the same command records the cached stages with all their numbers.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from tasks.core.errors import Preempted
from tasks.core.mlflow_run import Run
from tasks.core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLOW_RUN, STAGE, PROCESS = "prefect.flow_run_id", "stillhouse.stage", "stillhouse.process"
Warn = Callable[[str], None]


def tracker(settings: Settings, warn: Warn) -> "Tracker":
    """The tracker of the flow run that is running, one a process."""
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
        self._client: MlflowClient | None = None
        self._down = False
        self._experiment = self.call(self._find_experiment)
        self._parent: Run | None = None

    def call(self, action: "Callable[[MlflowClient], Any]", dispensable: bool = False) -> Any:
        """Runs `action(client)`; None, and a warning, when MLflow fails: from then on it is not asked again.

        A `dispensable` action that MLflow only refuses (a param that changed, say) is the only thing that is lost.
        """
        from boto3.exceptions import Boto3Error  # noqa: PLC0415  (what artifacts straight to S3 may raise)
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
        from mlflow import MlflowClient  # noqa: PLC0415  (two seconds)
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

        failures = MlflowException, SQLAlchemyError, Boto3Error, BotoCoreError, ClientError, ImportError, OSError
        if self._down:
            return None
        try:
            if self._client is None:
                self._client = MlflowClient(self._settings.tracking_uri)
            return action(self._client)
        except failures as error:
            said = without_password(str(error))
            if dispensable and isinstance(error, MlflowException) and error.get_http_status_code() == 400:
                self.warn(f"MLflow refused to record something; the run goes on: {said}")
                return None
            self._down = True
            self.warn(
                f"MLflow at {without_password(self._settings.tracking_uri)} failed; the run goes on without it. "
                f"Once it works again, the same command records what was done. ({said})"
            )
            return None

    def _find_experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        name = self._settings.experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        sqlite = self._settings.tracking_uri.startswith("sqlite")
        location = (self._settings.root / "mlartifacts").as_uri() if sqlite else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another run made it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return found.experiment_id

    def flow(self) -> Run:
        """The parent run of this flow run: found by its tag, taken up again on a retry."""
        if self._parent is None:
            self._parent = self._open({FLOW_RUN: self._flow_run_id}, self._name, parent=None)
        return self._parent

    def seen(self, digest: str) -> str | None:
        """The run that recorded the artifact `digest`, if MLflow knows one."""

        def search(client: "MlflowClient") -> str | None:
            query = f"tags.digest = '{digest}' and tags.kind != ''"
            found = client.search_runs([self._experiment], query, max_results=1)
            return str(found[0].info.run_id) if found else None

        found: str | None = self.call(search)
        return found

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """The nested run of a stage, ended as FINISHED, FAILED (an error) or KILLED (stopped from outside)."""
        run = self._open({FLOW_RUN: self._flow_run_id, STAGE: name}, name, parent=self.flow().run_id)
        with self.ended(run):
            yield run

    @contextmanager
    def ended(self, run: Run) -> Iterator[None]:
        """Ends `run` as the block ends."""
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
            found = [run for run in runs if parent or STAGE not in run.data.tags]
            if found:
                run_id = str(found[0].info.run_id)
                client.update_run(run_id, status="RUNNING")
                client.set_tag(run_id, PROCESS, process)
                return run_id
            made = client.create_run(self._experiment, tags=tags | lineage | {PROCESS: process}, run_name=name)
            return str(made.info.run_id)

        return Run(self, self.call(find_or_create))

    def link(self, run: Run) -> str | None:
        """Where a browser finds the run; for SQLite, once `make mlflow-ui` runs."""
        if run.run_id is None:
            return None
        uri = self._settings.tracking_uri
        server = without_password(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
        return f"{server}/#/experiments/{self._experiment}/runs/{run.run_id}"

    def reap(self) -> None:
        """Runs of this host whose process was killed without a word are ended as KILLED."""
        self.call(self._reap)

    def _reap(self, client: "MlflowClient") -> None:
        for run in client.search_runs([self._experiment], "attributes.status = 'RUNNING'"):
            host, _, rest = run.data.tags.get(PROCESS, "::").partition(":")
            pid, _, created = rest.partition(":")
            if host == socket.gethostname() and not _alive(int(pid), int(created)):
                client.set_terminated(run.info.run_id, "KILLED")


def without_password(text: str) -> str:
    """`text` with `user:password@` of its URLs left out: it is going to be shown."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)


def _alive(pid: int, created: int) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - created) < 2
    except psutil.NoSuchProcess:
        return False
