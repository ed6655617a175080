"""Walks the weights of any number of models, and their activations where there is a dataset; says what would break.

python -m tasks.outliers.run config.json --models base=DIR --models student=BASE+ADAPTER [--dataset DIR] --out DIR
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.norms import adds_one, is_norm
from tasks.engine.weights import Weight, weights
from tasks.outliers import OutlierConfig
from tasks.outliers.formats import errors
from tasks.outliers.inherited import base_weights, bases, change, sentences, stream_sentences
from tasks.outliers.page import page, top_tensors
from tasks.outliers.pictures import draw_all
from tasks.outliers.stats import describe, gain, rounding, sample
from tasks.outliers.targets import TARGETS, judge, rescale_needed

Numbers = dict[str, Any]
WORKERS = 8  # at most: each holds some pieces of a tensor


def find_outliers(
    config: OutlierConfig, models: dict[str, ModelDir], out: Path, job: Job, dataset: Path | None = None
) -> Report:
    """Writes `weights.json`, `verdict.json`, a report, and with a dataset `activations.json` and `imatrix.gguf`."""
    if not models:
        raise BadConfig("no models to look at: give --models NAME=DIR")
    origins = bases(models)
    seen: dict[object, Numbers] = {}
    found: dict[str, list[Numbers]] = {}
    with one_thread():
        for name, model in models.items():
            found[name] = walk(config, name, model, origins.get(name), seen, job)
    focus = config.focus if config.focus in models else list(models)[-1]
    observed: dict[str, Numbers] = {}
    outcomes: dict[str, Numbers] = {}
    if dataset is not None and config.calibration_rows:
        from tasks.outliers.observed import observe_model  # noqa: PLC0415 - transformers only where models run

        for name, model in models.items():
            saw = observe_model(config, name, model, dataset, out, name == focus, job)
            observed[name], outcomes[name] = saw.summary, saw.outcomes
            if name == focus:
                _weigh(config, model, found[name], saw.seen.linears)
    verdict = {
        "format": 1,
        "focus": focus,
        "models": {
            name: _verdict(config, tensors, observed.get(name), outcomes.get(name, {}))
            for name, tensors in found.items()
        },
    }
    told = [one for name, tensors in found.items() for one in sentences(name, tensors, config.large_gain)]
    named = {name: next((one for one in models if models[one] == base), "") for name, base in origins.items()}
    told += stream_sentences(named, observed)
    for sentence in told:
        job.log(sentence)
    _write(out / "weights.json", {"models": found})
    _write(out / "activations.json", {"models": observed})
    _write(out / "verdict.json", {**verdict, "sentences": told})
    report = out / "report"
    report.mkdir()
    draw_all(found, observed, report)
    (report / "outliers.md").write_text(page(found, observed, verdict, told, config.top), encoding="utf-8")
    metrics = {
        f"{name}_{key}": value for name in found for key, value in _headline(found[name], observed.get(name)).items()
    }
    return Report(
        facts={key: value for key, value in metrics.items() if key.endswith(("largest_gain", "stream_peak"))}
        | {f"{target}": verdict["models"][focus]["targets"][target]["verdict"] for target in TARGETS},  # type: ignore[index]
        metrics=metrics,
        warnings=[sentence for sentence in told if sentence.endswith("do not use it")],
        details={
            "verdict": told,
            "table": [row for name, tensors in found.items() for row in top_tensors(name, tensors, config.top)],
            "targets": [row for name in found for row in _target_rows(name, verdict["models"][name]["targets"])],  # type: ignore[index]
        },
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: tensors share the cores instead, and pieces are as small as a core's cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def walk(
    config: OutlierConfig, name: str, model: ModelDir, base: ModelDir | None, seen: dict[object, Numbers], job: Job
) -> list[Numbers]:
    """One model's numbers, tensor by tensor; what another model has from the same bytes is not computed again."""
    theirs = base_weights(base) if base is not None else {}
    mine = list(weights(model))

    def look(weight: Weight) -> Numbers:
        known = None if weight.changed else seen.get(weight.stored)
        numbers = known or describe(weight, config.sigmas, config.sample_values)
        numbers = {**numbers, **_norm(model, weight)}
        if weight.name in theirs:
            numbers |= change(weight, theirs[weight.name])
            before = _norm(model, theirs[weight.name])
            numbers |= {"base_gain": before["gain"]} if before else {}
        return numbers

    largest_first = sorted(range(len(mine)), key=lambda i: -prod(mine[i].shape))
    tensors: dict[int, Numbers] = {}
    with ThreadPoolExecutor(min(WORKERS, len(os.sched_getaffinity(0)))) as pool:
        for i, numbers in zip(largest_first, pool.map(look, [mine[i] for i in largest_first]), strict=True):
            tensors[i] = numbers
            job.progress(len(tensors), len(mine), "tensors", name)
    for i, weight in enumerate(mine):
        if not weight.changed:
            seen[weight.stored] = {k: v for k, v in tensors[i].items() if k not in CHANGES}
    return [tensors[i] for i in range(len(mine))]


CHANGES = ("changed", "max_change", "relative_change", "base_gain", "gain", "rounding", "adds_one")


def _norm(model: ModelDir, weight: Weight) -> Numbers:
    if not is_norm(weight.name, weight.shape):
        return {}
    one = adds_one(model.base, weight.name)
    values = weight.rows()
    return {"gain": gain(values, one), "rounding": rounding(values, one), "adds_one": one}


def _weigh(config: OutlierConfig, model: ModelDir, tensors: list[Numbers], linears: dict[str, Any]) -> None:
    """Adds to each observed matrix what a format would do to its output, channels weighed by what flows into them."""
    numbers = {tensor["tensor"]: tensor for tensor in tensors}
    for weight in weights(model):
        channels = linears.get(weight.name.removesuffix(".weight"))
        if channels is not None and config.sample_values:
            rows = sample(weight, config.sample_values)
            numbers[weight.name]["output_error"] = errors(rows, channels.mean_squares)


def _verdict(config: OutlierConfig, tensors: list[Numbers], seen: Numbers | None, outcomes: Numbers) -> Numbers:
    weighed = [tensor for tensor in tensors if "q4_0" in tensor.get("output_error", {})]
    weighed.sort(key=lambda tensor: -tensor["output_error"]["q4_0"])
    return {
        "seen": {"weights": True, "activations": seen is not None, "rows": seen["rows"] if seen else 0},
        "targets": judge(tensors, seen, outcomes, config.margin),
        "rescale": rescale_needed(seen, config.margin) if seen else None,
        "outcomes": outcomes,
        "sensitive": [{"tensor": one["tensor"], "output_error": one["output_error"]} for one in weighed[: config.top]],
    }


def _target_rows(name: str, targets: dict[str, Numbers]) -> list[Numbers]:
    return [
        {
            "model": name,
            "target": target,
            "verdict": said["verdict"],
            "because": "; ".join(said["because"]),
            "do": "; ".join(said["do"]),
        }
        for target, said in targets.items()
    ]


def _headline(tensors: list[Numbers], seen: Numbers | None) -> dict[str, float]:
    gains = [tensor["gain"]["max"] for tensor in tensors if "gain" in tensor]
    q4_0 = [tensor["error"]["q4_0"] for tensor in tensors if "q4_0" in tensor.get("error", {})]
    found = {
        "largest_gain": max(gains, default=0.0),
        "largest_weight": max(tensor["max"] for tensor in tensors),
        "worst_q4_0_error": max(q4_0, default=0.0),
        "not_finite": float(sum(tensor["nan"] + tensor["inf"] for tensor in tensors)),
    }
    return found | ({"stream_peak": seen["stream_peak"]} if seen else {})


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command(find_outliers)
