"""Output files of an evaluation: predictions.jsonl, scores.json, schema.json, pages, and the stage's report."""

import json
from pathlib import Path
from typing import Any

from tasks.core.command import Report
from tasks.core.metrics import Visibility, titles
from tasks.core.refs import ModelDir
from tasks.evaluate.generation import Schema
from tasks.evaluate.measurements import Measurements, speeds
from tasks.evaluate.pages import plot_confusion, write_mistakes
from tasks.evaluate.scores import values


def write_outputs(
    out: Path, predictions: list[dict[str, Any]], scores: dict[str, Any], schema: Schema | None, mistakes: int
) -> None:
    """Writes everything but report.json; `mistakes` is how many wrong answers the page has."""
    # Half of a surrogate pair is no UTF-8: it is written as JSON's own escape.
    with (out / "predictions.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    (out / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    if schema is not None:
        (out / "schema.json").write_text(json.dumps(schema, indent=1), encoding="utf-8")
    directory = out / "report"
    directory.mkdir()
    write_mistakes(predictions, mistakes, directory / "mistakes.md")
    if scores["confusion"]:
        plot_confusion(scores["confusion"], directory / "confusion.png")


def report(scores: dict[str, Any], measurements: Measurements, size: int, weight_format: str) -> Report:
    """The stage's report: facts are the scores that the page shows, timings and size; metrics all numbers."""
    score_values = values(scores)
    perplexities = {
        f"{name}_perplexity": round(result["perplexity"], 4) for name, result in scores["perplexity"].items()
    }
    constrained = {
        f"constrained_{name}": value for name, value in scores.get("constrained", {}).get("held", {}).items()
    }
    timings = speeds(measurements)
    page_scores = {name: score_values[name] for name in titles(Visibility.PAGE) if name in score_values}
    facts = {**page_scores, **perplexities, "format": weight_format, **timings, "bytes": size}
    cut = sum(measurements.generation.cut)
    facts |= {"cut_answers": cut, "rows": scores["rows"]}
    return Report(
        facts=facts,
        warnings=[cut_warning(cut, scores)] if cut else [],
        metrics={
            **score_values,
            **perplexities,
            **constrained,
            **timings,
            "bytes": float(size),
            "cut_answers": float(cut),
        },
        details={
            "generated_tokens": measurements.generation.tokens,
            "generation_seconds": round(measurements.generation.seconds, 3),
            "latencies_ms": [round(1000 * latency.total, 2) for latency in measurements.latencies],
            "first_token_ms": [round(1000 * latency.first_token, 2) for latency in measurements.latencies],
        },
    )


def cut_warning(cut: int, scores: dict[str, Any]) -> str:
    """The sentence of an evaluation in which so many answers were cut."""
    return (
        f"{cut} of {scores['rows']} answers were cut at max_new_tokens={scores['max_new_tokens']}, scored as they "
        "are: predictions.jsonl marks them (`cut`). Raise max_new_tokens where expected answers are longer; a model "
        "that repeats itself never ends"
    )


def model_bytes(model: ModelDir, gguf: Path | None, statistics: dict[str, Any]) -> int:
    """Bytes of the weights: the GGUF file, the safetensors of base and adapter, or their size in 4 or 8 bits."""
    if gguf is not None:
        return (gguf / "model.gguf").stat().st_size
    if {"nf4", "int8"} & statistics["stored_as"].keys():
        return int(statistics["stored_bytes"])
    directories = [directory for directory in model if directory is not None]
    return sum(path.stat().st_size for directory in directories for path in directory.glob("*.safetensors"))


def gguf_format(gguf: Path) -> str:
    """The format in the GGUF stage's report, `GGUF` where there is none."""
    path = gguf / "report.json"
    return str(json.loads(path.read_text())["facts"]["format"]) if path.is_file() else "GGUF"
