"""What a training stage ends with: the trained model, measured and saved, and its report."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tasks.core.command import Report
from tasks.core.refs import ModelDir
from tasks.engine.models.save_trained import round_to_saved_dtype, save_trained
from tasks.engine.models.trainable import Method, count_parameters
from tasks.engine.training.history import WINDOW, History
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.validation import validation_losses


def save_results(
    spec: TrainingSpec,
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
    round_to_saved_dtype(model, method, base, dtype)
    losses = validation_losses(spec, model)
    if losses:
        history.add_validation(spec.steps, losses)
    save_trained(model, method, base, spec.config.chat_template, out, dtype)
    history.plot(out / "report" / "loss.png", title)
    final = {f"train_{name}": history.mean(name, WINDOW) for name in history.steps if name.endswith("loss")}
    final |= {f"validation_{name}": value for name, value in losses.items()}
    spec.job.metrics(spec.steps, **final)
    facts = {**counts, "steps": spec.steps, "method": method, "rows": len(spec.examples)}
    report.facts |= facts | {name: round(value, 4) for name, value in final.items()}
    report.metrics |= final
    report.details["batch"] = {"effective": spec.config.batch_size, "micro": spec.micro_batch}
    report.details["throughput"] = {name: float(f"{value:.4g}") for name, value in history.speed.items()}
    if history.speed:
        spec.job.log("throughput: " + ", ".join(f"{name} {value:.4g}" for name, value in history.speed.items()))
    return report
