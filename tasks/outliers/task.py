"""The outliers stage's task."""

from collections.abc import Mapping

from prefect import task

from tasks.core.refs import AnyModel, ReportRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage
from tasks.outliers import OutlierConfig


@task(name="find-outliers", **TASK)
def find_outliers(config: OutlierConfig, models: Mapping[str, AnyModel]) -> ReportRef:
    """Which weights of `models` quantization would break, and what was inherited from which."""
    return run_stage("outliers", config, {"models": models}, ReportRef, "outliers")
