"""Prefect task of the ingest stage, and its profile as a Prefect artifact."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from tasks.core.inputs import fetch_input
from tasks.core.refs import DatasetRef, FilesRef, ModelRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.settings import Settings
from tasks.core.shell import run_stage
from tasks.ingest import IngestConfig


@task(name="ingest", **TASK_OPTIONS)
def ingest(config: IngestConfig, files: FilesRef, tokenizer: ModelRef | None = None) -> DatasetRef:
    """Makes a checked dataset in canonical form of the user's files; see tasks/ingest/run.py.

    `tokenizer` is the model in whose tokens rows are counted; without one, `max_length` is not checked.
    """
    return run_stage("ingest", config, {"files": files, "tokenizer": tokenizer}, DatasetRef, "ingest")


def show_profile(dataset: DatasetRef) -> None:
    """Creates the flow run's Markdown artifact of the dataset's profile; its charts are in MLflow, in profile.html."""
    page = fetch_input(Settings(), dataset.digest) / "report" / "profile.md"
    create_markdown_artifact(page.read_text(encoding="utf-8"), key="dataset-profile")
