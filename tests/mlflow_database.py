"""An MLflow database with its tables but nothing in them: making them takes seconds, copying the file does not."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

_KEPT = tempfile.TemporaryDirectory(prefix="mlflow-")  # until the tests end


@cache
def _template() -> Path:
    from mlflow import MlflowClient

    path = Path(_KEPT.name) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def put_empty_database(home: Path) -> None:
    """Lays it into a `STILLHOUSE_HOME`, where a first run would make it."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_template(), home / "mlflow.db")
