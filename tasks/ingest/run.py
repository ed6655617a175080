"""Turns a team's own files into checked rows: train, validation, test, calibration, and a quarantine with reasons.

python -m tasks.ingest.run config.json --files DIR_OR_FILE --out DIR [--tokenizer MODEL_DIR]
"""

from pathlib import Path

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.ingest import IngestConfig


def ingest(config: IngestConfig, files: Path, out: Path, job: Job, tokenizer: ModelDir | None = None) -> Report:
    """Checks, splits and profiles the rows of `files`, a file or directory, with lengths in `tokenizer`'s tokens.

    Raises BadData for files that cannot be used at all, too few good rows, or too many faulty ones.
    """
    from tasks.ingest.two_pass import make_dataset  # noqa: PLC0415  (worker processes import this module, not that one)

    return make_dataset(config, files, out, job, tokenizer)


if __name__ == "__main__":
    command(ingest)
