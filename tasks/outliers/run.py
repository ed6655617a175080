"""Walks the weights of any number of models, and their activations where there is a dataset; says what would break.

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
from tasks.engine.weights.effective import weights
from tasks.outliers import OutlierConfig
from tasks.outliers.formats import errors
from tasks.outliers.inheritance import bases, growth, growth_sentence, sentences, stream_sentences
from tasks.outliers.page import page, top_tensors
from tasks.outliers.peaks import rescale_needed
from tasks.outliers.stats import sample
from tasks.outliers.targets import TARGETS, judge
from tasks.outliers.weight_walk import one_thread, walk

Numbers = dict[str, Any]


def find_outliers(
    config: OutlierConfig, models: dict[str, ModelDir], out: Path, job: Job, dataset: Path | None = None
) -> Report:
    """Writes `weights.json`, `verdict.json`, a report, and with a dataset `activations.json` and `imatrix.gguf`."""
    if not models:
        raise BadConfig("no models to look at: give --models NAME=DIR")
    origins = bases(models)
    seen: dict[object, Numbers] = {}
    found: dict[str, list[Numbers]] = {}
    drawing = Thread(target=import_module, args=("tasks.outliers.pictures",))
    drawing.start()  # half a second of imports, while weights are read
    with one_thread():
        for name, model in models.items():
            found[name] = walk(config, name, model, origins.get(name), seen, job)
    focus = config.focus if config.focus in models else list(models)[-1]
    observed: dict[str, Numbers] = {}
    outcomes: dict[str, Numbers] = {}
    if dataset is not None and config.calibration_rows:
        from tasks.outliers.forward_pass import observe_model  # noqa: PLC0415 - transformers only where models run

        for name, model in models.items():
            saw = observe_model(config, name, model, dataset, out, name == focus, job)
            observed[name], outcomes[name] = saw.summary, saw.outcomes
            if name == focus:
                _weigh(config, model, found[name], saw.seen.linears)
    judged = {
        name: _verdict(config, tensors, observed.get(name), outcomes.get(name, {})) for name, tensors in found.items()
    }
    told = [one for name, tensors in found.items() for one in sentences(name, tensors, config.large_gain)]
    told += stream_sentences(observed)
    for name, origin in origins.items():
        base = next((one for one in models if models[one] == origin), None)
        if base is not None:
            judged[name]["inherited"] = growth(base, found[name], found[base], observed.get(name), observed.get(base))
            told.append(growth_sentence(name, judged[name]["inherited"]))
    verdict = {"format": 1, "focus": focus, "models": judged, "sentences": told}
    for sentence in told:
        job.log(sentence)
    _write(out / "weights.json", {"models": found})
    _write(out / "activations.json", {"models": observed})
    _write(out / "verdict.json", verdict)
    report = out / "report"
    report.mkdir()
    drawing.join()
    import_module("tasks.outliers.pictures").draw_all(found, observed, report)
    (report / "outliers.md").write_text(page(found, observed, judged, told, config.top), encoding="utf-8")
    metrics = {
        f"{name}_{key}": value for name in found for key, value in _headline(found[name], observed.get(name)).items()
    }
    return Report(
        facts={key: value for key, value in metrics.items() if key.endswith(("largest_gain", "stream_peak"))}
        | {f"{target}": judged[focus]["targets"][target]["verdict"] for target in TARGETS},
        metrics=metrics,
        warnings=[sentence for sentence in told if sentence.endswith("do not use it")],
        details={
            "verdict": told,
            "table": [row for name, tensors in found.items() for row in top_tensors(name, tensors, config.top)],
            "targets": [row for name in found for row in _target_rows(name, judged[name]["targets"])],
        },
    )


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
