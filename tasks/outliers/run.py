"""Audits the weights, and with a dataset the activations, of any number of models for what quantization would break.

python -m tasks.outliers.run config.json --models base=DIR --models student=BASE+ADAPTER [--dataset DIR] --out DIR
"""

import json
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.weights.effective import effective_weights
from tasks.outliers import OutlierConfig
from tasks.outliers.formats import errors
from tasks.outliers.inheritance import (
    bases,
    growth,
    growth_sentence,
    largest_gain,
    stream_sentences,
    weight_sentences,
)
from tasks.outliers.page import page, top_tensors
from tasks.outliers.peaks import rescale_factor
from tasks.outliers.target_rules import assess
from tasks.outliers.targets import TARGETS, Evidence
from tasks.outliers.tensor_statistics import sample
from tasks.outliers.weight_walk import single_thread, walk

Numbers = dict[str, Any]


def find_outliers(
    config: OutlierConfig, models: dict[str, ModelDir], out: Path, job: Job, dataset: Path | None = None
) -> Report:
    """Writes `weights.json`, `verdict.json`, a report, and with a dataset `activations.json` and `imatrix.gguf`."""
    if not models:
        raise BadConfig("no models to look at: give --models NAME=DIR")
    base_of = bases(models)
    pictures = Thread(target=import_module, args=("tasks.outliers.pictures",))
    pictures.start()  # half a second of imports, while weights are read
    tensors: dict[str, list[Numbers]] = {}
    cache: dict[object, Numbers] = {}
    with single_thread():
        for name, model in models.items():
            tensors[name] = walk(config, name, model, base_of.get(name), cache, job)
    focus = config.focus if config.focus in models else list(models)[-1]
    activations: dict[str, Numbers] = {}
    trials: dict[str, Numbers] = {}
    if dataset is not None and config.calibration_rows:
        from tasks.outliers.forward_pass import observe_model  # noqa: PLC0415 - transformers only where models run

        for name, model in models.items():
            observed = observe_model(config, name, model, dataset, out, name == focus, job)
            activations[name], trials[name] = observed.summary, observed.trials
            if name == focus:
                _add_output_errors(config, model, tensors[name], observed.statistics.linears)
    verdicts = {
        name: _verdict(config, numbers, activations.get(name), trials.get(name, {}))
        for name, numbers in tensors.items()
    }
    sentences = [
        sentence for name, numbers in tensors.items() for sentence in weight_sentences(name, numbers, config.large_gain)
    ]
    sentences += stream_sentences(activations)
    for name, directory in base_of.items():
        base = next((other for other in models if models[other] == directory), None)
        if base is not None:
            comparison = growth(base, tensors[name], tensors[base], activations.get(name), activations.get(base))
            verdicts[name]["inherited"] = comparison
            sentences.append(growth_sentence(name, comparison))
    for sentence in sentences:
        job.log(sentence)
    _write(out / "weights.json", {"models": tensors})
    _write(out / "activations.json", {"models": activations})
    _write(out / "verdict.json", {"format": 1, "focus": focus, "models": verdicts, "sentences": sentences})
    report = out / "report"
    report.mkdir()
    pictures.join()
    import_module("tasks.outliers.pictures").draw_all(tensors, activations, report)
    (report / "outliers.md").write_text(page(tensors, activations, verdicts, sentences, config.top), encoding="utf-8")
    return _report(config, focus, tensors, activations, verdicts, sentences)


def _add_output_errors(config: OutlierConfig, model: ModelDir, tensors: list[Numbers], linears: dict[str, Any]) -> None:
    """Adds each format's error in every linear layer's output: channels weighed by their inputs' mean square."""
    numbers = {tensor["tensor"]: tensor for tensor in tensors}
    for weight in effective_weights(model):
        channels = linears.get(weight.name.removesuffix(".weight"))
        if channels is not None and config.sample_values:
            rows = sample(weight, config.sample_values)
            numbers[weight.name]["output_error"] = errors(rows, channels.mean_squares)


def _verdict(config: OutlierConfig, tensors: list[Numbers], activations: Numbers | None, trials: Numbers) -> Numbers:
    """One model's part of `verdict.json`."""
    weighed = [tensor for tensor in tensors if "q4_0" in tensor.get("output_error", {})]
    weighed.sort(key=lambda tensor: -tensor["output_error"]["q4_0"])
    rows = activations["rows"] if activations else 0
    return {
        "seen": {"weights": True, "activations": activations is not None, "rows": rows},
        "targets": assess(Evidence(tensors, activations, trials, config.margin)),
        "rescale": rescale_factor(activations, config.margin) if activations else None,
        "outcomes": trials,
        "sensitive": [
            {"tensor": tensor["tensor"], "output_error": tensor["output_error"]} for tensor in weighed[: config.top]
        ],
    }


def _report(
    config: OutlierConfig,
    focus: str,
    tensors: dict[str, list[Numbers]],
    activations: dict[str, Numbers],
    verdicts: dict[str, Numbers],
    sentences: list[str],
) -> Report:
    metrics = {
        f"{name}_{key}": value
        for name, numbers in tensors.items()
        for key, value in _headline(numbers, activations.get(name)).items()
    }
    return Report(
        facts={key: value for key, value in metrics.items() if key.endswith(("largest_gain", "stream_peak"))}
        | {target: verdicts[focus]["targets"][target]["verdict"] for target in TARGETS},
        metrics=metrics,
        warnings=[sentence for sentence in sentences if sentence.endswith("do not use it")],
        details={
            "verdict": sentences,
            "table": [row for name, numbers in tensors.items() for row in top_tensors(name, numbers, config.top)],
            "targets": [row for name in tensors for row in _target_rows(name, verdicts[name]["targets"])],
        },
    )


def _target_rows(name: str, targets: dict[str, Numbers]) -> list[Numbers]:
    return [
        {
            "model": name,
            "target": target,
            "verdict": assessment["verdict"],
            "because": "; ".join(assessment["because"]),
            "do": "; ".join(assessment["do"]),
        }
        for target, assessment in targets.items()
    ]


def _headline(tensors: list[Numbers], activations: Numbers | None) -> dict[str, float]:
    """A model's numbers for MLflow."""
    q4_0 = [tensor["error"]["q4_0"] for tensor in tensors if "q4_0" in tensor.get("error", {})]
    numbers = {
        "largest_gain": largest_gain(tensors),
        "largest_weight": max(tensor["max"] for tensor in tensors),
        "worst_q4_0_error": max(q4_0, default=0.0),
        "not_finite": float(sum(tensor["nan"] + tensor["inf"] for tensor in tensors)),
    }
    return numbers | ({"stream_peak": activations["stream_peak"]} if activations else {})


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command(find_outliers)
