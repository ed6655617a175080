"""What a training stage begins and ends with: rows in, the trained model and its report out."""

import hashlib
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.core.command import Report
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import HOW
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import encode_file
from tasks.engine.models.trainable import Method, count_parameters, round_to_saved, save_trained
from tasks.engine.training.history import WINDOW, History
from tasks.engine.training.spec import Plan, validation_losses


def read_splits(
    tokenizer: PreTrainedTokenizerBase, dataset: Path, max_length: int, report: Report, job: Job
) -> tuple[list[Example], list[Example]]:
    """Training and validation rows of a dataset directory as ids; the validation rows may be missing.

    What is left out is said in the report's warnings and in the job's log.
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
    """Names a run by its config without `HOW`, its rows and its models' configs and sizes: whose checkpoints it may go
    on from."""
    digest = hashlib.sha256(config.model_dump_json(exclude=HOW).encode())
    for split in ("train.jsonl", "validation.jsonl"):
        digest.update((dataset / split).read_bytes() if (dataset / split).is_file() else b"-")
    for directory in (directory for model in models for directory in model if directory):
        for path in sorted(directory.glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            if path.name.startswith("adapter"):  # small, and one as large as the other
                digest.update(path.read_bytes())
        for path in sorted(directory.glob("*config.json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def finish(
    plan: Plan,
    model: PreTrainedModel,
    history: History,
    method: Method,
    base: ModelDir,
    out: Path,
    report: Report,
    title: str,
    dtype: torch.dtype | None = None,
) -> Report:
    """Measures the model as it will be saved (in the base's dtype or in `dtype`), saves it, and fills the report."""
    counts = count_parameters(model)
    round_to_saved(model, method, base, dtype)
    losses = validation_losses(plan, model)
    if losses:
        history.add_validation(plan.steps, losses)
    save_trained(model, method, base, plan.config.chat_template, out, dtype)
    history.plot(out / "report" / "loss.png", title)
    final = {f"train_{name}": history.mean(name, WINDOW) for name in history.steps if name.endswith("loss")}
    final |= {f"validation_{name}": value for name, value in losses.items()}
    plan.job.metrics(plan.steps, **final)
    facts = {**counts, "steps": plan.steps, "method": method, "rows": len(plan.examples)}
    report.facts |= facts | {name: round(value, 4) for name, value in final.items()}
    report.metrics |= final
    report.details["batch"] = {"effective": plan.config.batch_size, "micro": plan.micro_batch}
    report.details["throughput"] = {name: float(f"{value:.4g}") for name, value in history.speed.items()}
    if history.speed:
        plan.job.log("throughput: " + ", ".join(f"{name} {value:.4g}" for name, value in history.speed.items()))
    return report
