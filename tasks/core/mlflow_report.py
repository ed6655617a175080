"""Downloads a finished run's report from MLflow."""

from pathlib import Path

from tasks.core.errors import BadConfig
from tasks.core.mlflow_connection import without_password


def download_report(run: str, scratch: Path, tracking_uri: str) -> Path:
    """Downloads the artifacts `report/` of the MLflow run with id `run` to `scratch`; BadConfig when there are none."""
    from mlflow.artifacts import download_artifacts  # noqa: PLC0415  (takes seconds)
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return Path(
            download_artifacts(run_id=run, artifact_path="report", dst_path=str(scratch), tracking_uri=tracking_uri)
        )
    except (MlflowException, OSError) as error:
        message = f"no run {run!r} with a report in MLflow at {tracking_uri}: {error}"
        raise BadConfig(without_password(message)) from error
