"""The ingest stage's task, and its profile as a Prefect artifact."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from tasks.core.inputs import fetched
from tasks.core.refs import DatasetRef, FilesRef, ModelRef
from tasks.core.retry import TASK
from tasks.core.settings import Settings
from tasks.core.shell import run_stage
from tasks.ingest import IngestConfig


@task(name="ingest", **TASK)
def ingest(config: IngestConfig, files: FilesRef, tokenizer: ModelRef | None = None) -> DatasetRef:
    """The user's files as a checked dataset in canonical form; see tasks/ingest/run.py.

    `tokenizer` is the model whose tokens rows are counted in; without one, `max_length` is not looked at.
    """
    return run_stage("ingest", config, {"files": files, "tokenizer": tokenizer}, DatasetRef, "ingest")


def show_profile(dataset: DatasetRef) -> None:
    """The dataset's profile as a Markdown artifact of the flow run; its pictures are in MLflow, in profile.html."""
    page = fetched(Settings(), dataset.digest) / "report" / "profile.md"
    create_markdown_artifact(page.read_text(encoding="utf-8"), key="dataset-profile")
