"""The ingest stage's task."""

from prefect import task

from tasks.core.refs import DatasetRef, FilesRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage
from tasks.ingest import IngestConfig


@task(name="ingest", **TASK)
def ingest(config: IngestConfig, files: FilesRef) -> DatasetRef:
    """The user's files as a checked dataset in canonical form; see tasks/ingest/run.py."""
    return run_stage("ingest", config, {"files": files}, DatasetRef, "ingest")
