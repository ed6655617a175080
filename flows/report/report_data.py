"""What the page is made of, read from the artifacts of a run: plain values, missing parts left out."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.inputs import fetch_input
from tasks.core.paired_comparison import Prediction, disagreements, read_predictions
from tasks.core.refs import Ref, ReportRef
from tasks.core.settings import Settings

DISAGREEMENTS = 12
"""Rows on the page for each pair of models that disagree."""


class Evaluation(NamedTuple):
    """One model's evaluation: `scores.json`, `report.json` and `predictions.jsonl`."""

    name: str
    scores: dict[str, Any]
    report: dict[str, Any]
    predictions: list[Prediction]

    @property
    def estimates(self) -> dict[str, Any]:
        """Every score with its interval, by name."""
        return {**self.scores["rates"], **self.scores["means"]}


class Curve(NamedTuple):
    """A training run's losses by name: (step, value) in order."""

    name: str
    losses: dict[str, list[tuple[float, float]]]


class Picture(NamedTuple):
    """A picture inside the page, as a data URI."""

    title: str
    uri: str


class ReportData(NamedTuple):
    """What the page shows beside the summary. `gate` is gate.json; None where no gate judged the run."""

    evaluations: list[Evaluation]
    curves: list[Curve]
    pictures: list[Picture]
    gate: dict[str, Any] | None
    provenance: dict[str, Any] | None


def read_report_data(
    settings: Settings, scores: Mapping[str, ReportRef], illustrated: Mapping[str, Ref], gate: ReportRef | None
) -> ReportData:
    """Fetches the artifacts; the page has loss curves and pictures of those that are `illustrated`."""
    evaluations = [read_evaluation(name, fetch_input(settings, ref.digest)) for name, ref in scores.items()]
    directories = {name: fetch_input(settings, ref.digest) for name, ref in illustrated.items()}
    curves = [read_curve(name, directory / "report" / "events.jsonl") for name, directory in directories.items()]
    gate_directory = fetch_input(settings, gate.digest) if gate is not None else None
    student = directories.get("student") or next(iter(directories.values()), None)
    return ReportData(
        evaluations,
        [curve for curve in curves if curve.losses],
        [picture for name, directory in directories.items() for picture in read_pictures(name, directory)],
        json.loads((gate_directory / "gate.json").read_text()) if gate_directory is not None else None,
        json.loads((student / "provenance.json").read_text()) if student is not None else None,
    )


def read_evaluation(name: str, directory: Path) -> Evaluation:
    """An output directory of the evaluate stage."""
    scores, report = (json.loads((directory / file).read_text()) for file in ("scores.json", "report.json"))
    return Evaluation(name, scores, report, read_predictions(directory / "predictions.jsonl"))


def read_curve(name: str, events: Path) -> Curve:
    """The losses among a stage's events: `loss`, `kd_loss`, `ce_loss` by step, and validation losses."""
    losses: dict[str, dict[float, float]] = {}
    for line in events.read_text(encoding="utf-8").splitlines() if events.is_file() else []:
        event = json.loads(line)
        if event["event"] == "metrics":
            for key, value in event["values"].items():
                if key.endswith("loss") and not key.startswith(("train_", "teacher_")):
                    losses.setdefault(key, {})[event["step"]] = value
    return Curve(name, {key: sorted(points.items()) for key, points in losses.items() if len(points) > 1})


def read_pictures(name: str, directory: Path) -> list[Picture]:
    """The stage's pictures as data URIs; loss curves and confusion are shown by the page itself."""
    paths = [path for path in sorted(directory.glob("report/*.png")) if path.stem not in ("loss", "confusion")]
    return [
        Picture(f"{name}: {path.stem}", "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
        for path in paths
    ]


def differences(evaluations: list[Evaluation], a: str, b: str) -> dict[str, Any] | None:
    """Rows that only one of two models has right; None when one was not evaluated."""
    predictions = {evaluation.name: evaluation.predictions for evaluation in evaluations}
    if a not in predictions or b not in predictions:
        return None
    rows = disagreements(predictions[a], predictions[b])
    return {"a": a, "b": b, "count": len(rows), "worse": sum(not row["better"] for row in rows),
            "rows": rows[:DISAGREEMENTS]}  # fmt: skip
