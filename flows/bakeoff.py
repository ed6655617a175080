"""One model by every quantization method: the cost of each, and whether the audit's verdict predicted it.

python -m flows.bakeoff deployments/presets/bakeoff.yaml

model ── take ──┬── find outliers ──┬── bake (one a method and dtype) ──┬── table and plot
rows ── ingest ─┘                   └── GGUF (one a kind) ── evaluate ──┘
"""

import json
from typing import Any, Self

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import ConfigDict, Field, model_validator

from flows.checks import require_separate_rows
from flows.config import files_by_split
from flows.flow_config import FlowConfig
from flows.stages import Stages
from flows.start import start
from flows.verdict import verdict_table
from tasks.bakeoff import METHODS, BakeoffConfig
from tasks.bakeoff.prediction import DTYPE_TARGETS, focus_targets
from tasks.bakeoff.table import draw, gguf_row, markdown, table
from tasks.bakeoff.task import bake
from tasks.core.import_inputs import import_files, import_model
from tasks.core.inputs import fetch_input
from tasks.core.refs import DatasetRef, ModelRef, ReportRef
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.task import evaluate
from tasks.gguf import GgufConfig
from tasks.gguf.task import convert
from tasks.ingest import IngestConfig
from tasks.ingest.task import ingest
from tasks.outliers import OutlierConfig
from tasks.outliers.task import find_outliers

KINDS = ["BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS"]


def every_method() -> list[BakeoffConfig]:
    """Every registered method in both 16-bit dtypes."""
    return [BakeoffConfig(method=name, dtype=dtype) for dtype in ("bfloat16", "float16") for name in METHODS]


class BakeoffFlowConfig(FlowConfig):
    """One model by every quantization method. A method whose library is not installed is a row that says so."""

    model_config = ConfigDict(title="Bake-off")

    model: str
    """The model: a name on the Hugging Face hub or a local directory."""
    revision: str | None = None
    """Hub revision to pin."""
    train: str
    """Rows like those the model will meet; methods calibrate on a sample of them."""
    test: str | None = None
    """Held-out rows that every result is compared on; without it a part of `train` is held back."""
    ingest: IngestConfig = IngestConfig(allow_few_rows=True)
    outliers: OutlierConfig = OutlierConfig()
    methods: list[BakeoffConfig] = every_method()
    """The methods, each in the dtype of what it does not quantize."""
    gguf: list[GgufConfig] = Field(
        default=[
            GgufConfig(kind=kind, imatrix=imatrix, proof_rows=64, max_mean_kl=1e9, min_top1=0)
            for kind in KINDS
            for imatrix in ((False, True) if kind not in ("BF16", "Q8_0") else (False,))
        ]
    )
    """The GGUF files, with and without the importance matrix; budgets are wide, for a bad one is a result too."""
    evaluate: EvaluateConfig = EvaluateConfig(limit_rows=64, latency_rows=8, perplexity_rows=0)
    """How GGUF files are scored: on as many rows as the methods, and their speed on rows asked one at a time."""

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        require_separate_rows(self.train, test=self.test)
        return self


@flow(name="stillhouse-bakeoff", validate_parameters=True, persist_result=False)
def bakeoff(config: BakeoffFlowConfig) -> dict[str, Any]:
    """Measures every method on the model; writes the table and the plot.

    Returns `rows` (the measurements), `table` (the same as formatted text) and the directory of the report.
    """
    with Stages(config) as run:
        model = run("import model", import_model, config.model, config.revision)
        files = run("import data", import_files, files_by_split(train=config.train, test=config.test))
        dataset = run("ingest", ingest, config.ingest, files, model)
        outliers = run("outliers", find_outliers, config.outliers, {"model": model}, dataset)
        verdict_table(run, outliers)
        rows = []
        for method in config.methods:
            report = run(f"bake {method.method} {method.dtype}", bake, method, model, dataset, outliers)
            rows.append(_report(run, report)["details"]["row"])
        rows += [_gguf(run, config, gguf, model, dataset, outliers) for gguf in config.gguf]
        return _publish(run, rows)


def _gguf(
    run: Stages, config: BakeoffFlowConfig, file: GgufConfig, model: ModelRef, dataset: DatasetRef, outliers: ReportRef
) -> dict[str, Any]:
    """Converts, evaluates and tabulates one GGUF file."""
    label = f"{file.kind}{' imatrix' if file.imatrix else ''}"
    gguf = run(f"gguf {label}", convert, file, model, dataset, outliers=outliers)
    facts = run(f"evaluate {label}", evaluate, config.evaluate, model, dataset, label, gguf).facts
    columns = {"tokens_per_second": "alone_tokens_per_second", "exact": "exact_match"}
    scores = {column: facts[fact] for column, fact in columns.items() if fact in facts}
    verdict = json.loads((fetch_input(run.settings, outliers.digest) / "verdict.json").read_text())
    predicted = focus_targets(verdict)[DTYPE_TARGETS["float32"]]["verdict"]
    report = _report(run, gguf)
    seconds, peak = report["metrics"]["conversion_seconds"], report["metrics"]["conversion_peak_bytes"]
    weighed = report["details"]["weighed"]
    return gguf_row(gguf.facts, seconds, file.imatrix, weighed, peak_bytes=peak, predicted=predicted, **scores)


def _report(run: Stages, ref: Any) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((fetch_input(run.settings, ref.digest) / "report.json").read_text())
    return report


def _publish(run: Stages, rows: list[dict[str, Any]]) -> dict[str, Any]:
    directory = run.report
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bakeoff.json").write_text(json.dumps(rows, indent=1))
    (directory / "bakeoff.md").write_text(markdown(rows))
    draw(rows, directory / "bakeoff.png")
    run.mlflow.artifacts(directory, "report")
    create_table_artifact(table(rows), key="bakeoff", description="What each quantization method costs")
    return {
        "rows": rows,
        "table": table(rows),
        "report": str(directory),
        "stages": run.records,
        "flow_run_id": run.flow_run_id,
        "mlflow_run_id": run.mlflow.run_id,
    }


def show(summary: dict[str, Any]) -> None:
    """The table in the terminal."""
    print(markdown(summary["rows"]))
    print(f"Report:   {summary['report']}")


if __name__ == "__main__":
    start(bakeoff, BakeoffFlowConfig, show)
