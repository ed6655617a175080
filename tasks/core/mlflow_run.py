"""Writes one MLflow run from the parent process of a stage."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.mlflow_connection import MlflowConnection

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH_SECONDS = 1.0


class Run:
    """One MLflow run; with `run_id` None, or while MLflow is down, every method does nothing."""

    def __init__(self, connection: MlflowConnection, run_id: str | None) -> None:
        self.run_id = run_id
        self._connection = connection
        self._unsent: list[Any] = []
        self._sent = time.monotonic()

    def params(self, values: dict[str, Any]) -> None:
        """Logs settings as params; a retry logs the same values again, which MLflow allows."""
        from mlflow.entities import Param  # noqa: PLC0415

        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        self._do(lambda client, run_id: client.log_batch(run_id, params=params))

    def metrics(self, step: int, values: dict[str, float], timestamp: float | None = None) -> None:
        """Logs numbers at a step, in batches at most once a second."""
        from mlflow.entities import Metric  # noqa: PLC0415

        milliseconds = int((timestamp or time.time()) * 1000)
        self._unsent += [Metric(name, value, milliseconds, step) for name, value in values.items()]
        if time.monotonic() - self._sent > BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sends the metrics that were not sent yet."""
        metrics, self._unsent, self._sent = self._unsent, [], time.monotonic()
        if metrics:
            self._do(lambda client, run_id: client.log_batch(run_id, metrics=metrics))

    def tags(self, **values: str) -> None:
        """Sets tags, such as `out_of_memory.2`."""
        for name, value in values.items():
            self._do(lambda client, run_id, n=name, v=value: client.set_tag(run_id, n, v[:5000]))

    def artifacts(self, path: Path, folder: str | None = None) -> None:
        """Logs a small file or a directory of small files; weights stay in the store."""
        log = "log_artifacts" if path.is_dir() else "log_artifact"
        self._do(lambda client, run_id: getattr(client, log)(run_id, str(path), folder))

    def dataset(self, name: str, digest: str, uri: str, profile: dict[str, Any]) -> None:
        """Logs a stage's dataset as an MLflow input; its sha256 is a tag, for MLflow's digest has 36 characters."""
        from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

        entity = Dataset(name, digest[:36], "stillhouse", uri, profile=json.dumps(profile))
        tags = [InputTag("mlflow.data.context", "training"), InputTag("sha256", digest)]
        self._do(lambda client, run_id: client.log_inputs(run_id, [DatasetInput(entity, tags)]))

    def register(self, model: str, source: str, digest: str) -> None:
        """Registers a version of a model, once for each digest."""

        def register(client: "MlflowClient", run_id: str) -> None:
            from mlflow.exceptions import MlflowException  # noqa: PLC0415

            versions = client.search_model_versions(f"name = '{model}'")
            if any(version.tags.get("sha256") == digest for version in versions):
                return
            try:
                if not versions:
                    client.create_registered_model(model)
                client.create_model_version(model, source, run_id, tags={"sha256": digest})
            except MlflowException as error:  # a remote server refuses sources on this host's disk
                self._connection.warn(f"{model} was not registered in MLflow: {error}")

        self._do(register)

    def end(self, status: str) -> None:
        """Ends the run as `FINISHED`, `FAILED` or `KILLED`."""
        self.flush()
        self._do(lambda client, run_id: client.set_terminated(run_id, status))

    def _do(self, call: Callable[..., None]) -> None:
        if self.run_id is not None:
            run_id = self.run_id
            self._connection.call(lambda client: call(client, run_id), dispensable=True)
