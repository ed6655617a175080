"""One model, every quantization method: what each costs, and whether the verdict foretold it.

python -m flows.bakeoff deployments/presets/bakeoff.yaml

model ── take ──┬── find outliers ──┬── bake (one a method and dtype) ──┬── table and plot
rows ── ingest ─┘                   └── GGUF (one a kind) ── evaluate ──┘
"""

import json
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import ConfigDict, Field

from flows.config import FlowConfig, given_files
from flows.stages import Stages
from flows.start import start
from flows.verdict import verdict_table
from tasks.bakeoff import BakeoffConfig, Method
from tasks.bakeoff.table import draw, gguf_row, markdown, table
from tasks.bakeoff.task import bake
from tasks.core.import_inputs import take_files, take_model
from tasks.core.inputs import fetched
from tasks.core.refs import DatasetRef, ModelRef, ReportRef
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.task import evaluate
from tasks.gguf import GgufConfig, Kind
from tasks.gguf.task import convert
from tasks.ingest import IngestConfig
from tasks.ingest.task import ingest
from tasks.outliers import OutlierConfig
from tasks.outliers.task import find_outliers

METHODS: list[Method] = [
    "none", "bnb-int8", "bnb-nf4", "quanto-int8", "quanto-int4", "quanto-int8-uncalibrated",
    "quanto-int4-uncalibrated", "quanto-int8-weights", "torchao-int8", "torchao-int8-activations", "torchao-int4",
    "gptq", "awq",
]  # fmt: skip
KINDS: list[Kind] = ["BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS"]


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
    methods: list[BakeoffConfig] = [
        BakeoffConfig(method=method, dtype=dtype) for dtype in ("bfloat16", "float16") for method in METHODS
    ]
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


@flow(name="stillhouse-bakeoff", validate_parameters=True, persist_result=False)
def bakeoff(config: BakeoffFlowConfig) -> dict[str, Any]:
    """Tries every method on the model; writes the table and the plot.

    Returns `rows` (what was measured), `table` (the same for people) and the directory of the report.
    """
    with Stages(config) as run:
        model = run("take model", take_model, config.model, config.revision)
        files = run("take data", take_files, given_files(train=config.train, test=config.test))
        dataset = run("ingest", ingest, config.ingest, files, model)
        outliers = run("outliers", find_outliers, config.outliers, {"model": model}, dataset)
        verdict_table(run, outliers)
        rows = []
        for one in config.methods:
            made = run(f"bake {one.method} {one.dtype}", bake, one, model, dataset, outliers)
            rows.append(_report(run, made)["details"]["row"])
        rows += [_gguf(run, config, one, model, dataset, outliers) for one in config.gguf]
        return _publish(run, rows)


def _gguf(
    run: Stages, config: BakeoffFlowConfig, one: GgufConfig, model: ModelRef, dataset: DatasetRef, outliers: ReportRef
) -> dict[str, Any]:
    label = f"{one.kind}{' imatrix' if one.imatrix else ''}"
    gguf = run(f"gguf {label}", convert, one, model, dataset, outliers=outliers)
    facts = run(f"evaluate {label}", evaluate, config.evaluate, model, dataset, label, gguf).facts
    known = {"tokens_per_second": "alone_tokens_per_second", "exact": "exact_match"}
    scores = {name: facts[fact] for name, fact in known.items() if fact in facts}
    foretold = json.loads((fetched(run.settings, outliers.digest) / "verdict.json").read_text())
    predicted = foretold["models"][foretold["focus"]]["targets"]["gguf_cpu"]["verdict"]
    made = _report(run, gguf)
    seconds, peak = made["metrics"]["conversion_seconds"], made["metrics"]["conversion_peak_bytes"]
    weighed = made["details"]["weighed"]
    return gguf_row(gguf.facts, seconds, one.imatrix, weighed, peak_bytes=peak, predicted=predicted, **scores)


def _report(run: Stages, ref: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((fetched(run.settings, ref.digest) / "report.json").read_text())
    return found


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
