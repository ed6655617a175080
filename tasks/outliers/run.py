"""Walks the weights of any number of models and says what quantization could break, and who brought it in.

python -m tasks.outliers.run config.json --models base=DIR --models student=BASE+ADAPTER --out DIR
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.stored import Stored
from tasks.engine.weights import Weight, weights
from tasks.outliers import OutlierConfig
from tasks.outliers.inherited import base_weights, bases, change, verdict
from tasks.outliers.norms import adds_one, is_norm
from tasks.outliers.page import page, top_tensors
from tasks.outliers.pictures import draw_norms, draw_tensors
from tasks.outliers.stats import describe, gain

Numbers = dict[str, Any]


def find_outliers(config: OutlierConfig, models: dict[str, ModelDir], out: Path, job: Job) -> Report:
    """Writes `outliers.json` (every tensor of every model) and a report of pictures and tables; streams throughout."""
    if not models:
        raise BadConfig("no models to look at: give --models NAME=DIR")
    origins = bases(models)
    seen: dict[Stored, Numbers] = {}
    found: dict[str, list[Numbers]] = {}
    with one_thread():
        for name, model in models.items():
            found[name] = walk(config, name, model, origins.get(name), seen, job)
    verdicts = [sentence for name, tensors in found.items() for sentence in verdict(name, tensors, config.large_gain)]
    for sentence in verdicts:
        job.log(sentence)
    (out / "outliers.json").write_text(json.dumps({"verdict": verdicts, "models": found}, indent=1))
    report = out / "report"
    report.mkdir()
    draw_norms(found, report / "norms.png")
    draw_tensors(found, report / "tensors.png")
    (report / "outliers.md").write_text(page(found, verdicts, config.top), encoding="utf-8")
    metrics = {f"{name}_{key}": value for name, tensors in found.items() for key, value in _headline(tensors).items()}
    return Report(
        facts={key: value for key, value in metrics.items() if key.endswith("largest_gain")},
        metrics=metrics,
        warnings=[sentence for sentence in verdicts if sentence.endswith("do not use it")],
        details={
            "verdict": verdicts,
            "table": [row for name, tensors in found.items() for row in top_tensors(name, tensors, config.top)],
        },
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: on pieces as small as a core's cache, waiting for other threads costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def walk(
    config: OutlierConfig, name: str, model: ModelDir, base: ModelDir | None, seen: dict[Stored, Numbers], job: Job
) -> list[Numbers]:
    """One model's numbers, tensor by tensor; what another model has from the same bytes is not computed again."""
    theirs = base_weights(base) if base is not None else {}
    mine = list(weights(model))
    tensors = []
    for i, weight in enumerate(mine):
        if weight.changed or weight.stored not in seen:
            numbers = describe(weight, config.sigmas)
            if not weight.changed:
                seen[weight.stored] = numbers
        else:
            numbers = seen[weight.stored]
        numbers = {**numbers, **_norm(model, weight)}
        if weight.name in theirs:
            numbers |= change(weight, theirs[weight.name])
            before = _norm(model, theirs[weight.name])
            numbers |= {"base_gain": before["gain"]} if before else {}
        tensors.append(numbers)
        job.progress(i + 1, len(mine), "tensors", name)
    return tensors


def _norm(model: ModelDir, weight: Weight) -> Numbers:
    if not is_norm(weight.name, weight.shape):
        return {}
    return {"gain": gain(weight.rows(), adds_one(model.base, weight.name))}


def _headline(tensors: list[Numbers]) -> dict[str, float]:
    gains = [tensor["gain"]["max"] for tensor in tensors if "gain" in tensor]
    errors = [tensor["error"]["q4_0"] for tensor in tensors if "error" in tensor]
    return {
        "largest_gain": max(gains, default=0.0),
        "largest_weight": max(tensor["max"] for tensor in tensors),
        "worst_q4_0_error": max(errors, default=0.0),
        "not_finite": float(sum(tensor["nan"] + tensor["inf"] for tensor in tensors)),
    }


if __name__ == "__main__":
    command(find_outliers)
