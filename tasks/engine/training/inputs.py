"""What a training stage reads: the dataset's splits as token ids, and the fingerprint of all that decides the run."""

import hashlib
from pathlib import Path

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import EXECUTION_FIELDS
from tasks.engine.data.chat_template import Example
from tasks.engine.data.dataset import encode_file


def read_splits(
    tokenizer: PreTrainedTokenizerBase, dataset: Path, max_length: int, report: Report, job: Job
) -> tuple[list[Example], list[Example]]:
    """Training and validation rows of a dataset directory as ids; a dataset may have no validation rows.

    Rows that are left out are named in the report's warnings and in the job's log.
    """

    def warn(text: str) -> None:
        report.warnings.append(text)
        job.log(text, "warning")

    train, validation = dataset / "train.jsonl", dataset / "validation.jsonl"
    if not train.is_file():
        raise BadData(f"{train} is not there: give a dataset directory that the ingest stage wrote")
    has_validation = validation.is_file() and validation.stat().st_size > 0
    rows = encode_file(tokenizer, train, max_length, warn)
    return rows, encode_file(tokenizer, validation, max_length, warn) if has_validation else []


def fingerprint(config: BaseModel, dataset: Path, *models: ModelDir) -> str:
    """Digest of config, rows and models, by which checkpoints are matched to runs.

    Of the config without `EXECUTION_FIELDS`; of models, their configs, file sizes and adapters.
    """
    digest = hashlib.sha256(config.model_dump_json(exclude=EXECUTION_FIELDS).encode())
    for split in ("train.jsonl", "validation.jsonl"):
        digest.update((dataset / split).read_bytes() if (dataset / split).is_file() else b"-")
    for directory in (directory for model in models for directory in model if directory):
        for path in sorted(directory.glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            if path.name.startswith("adapter"):  # small, and adapters of one shape are equally large
                digest.update(path.read_bytes())
        for path in sorted(directory.glob("*config.json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
