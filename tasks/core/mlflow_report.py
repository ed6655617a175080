"""A finished run's report, brought back from MLflow."""

from pathlib import Path

from tasks.core.errors import BadConfig
from tasks.core.tracking import without_password


def download_report(run: str, scratch: Path, tracking_uri: str) -> Path:
    """The artifacts `report/` of the MLflow run with id `run`, in `scratch`. Raises BadConfig when there are none."""
    from mlflow.artifacts import download_artifacts  # noqa: PLC0415  (takes seconds)
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return Path(
            download_artifacts(run_id=run, artifact_path="report", dst_path=str(scratch), tracking_uri=tracking_uri)
        )
    except (MlflowException, OSError) as error:
        where, said = without_password(tracking_uri), without_password(str(error))
        raise BadConfig(f"no run {run!r} with a report in MLflow at {where}: {said}") from error
