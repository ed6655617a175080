"""Any model to proven GGUF files: audit, remedy where asked for, convert, evaluate, gate.

python -m flows.quantize deployments/presets/quantize.yaml

model ── take ──┬── find outliers ──┐
                ├── merge (remedy) ─┴── GGUF (conversion a kind) ── evaluate ── gate ── report
rows ── ingest ─┘
"""

from typing import Any, Self

from prefect import flow
from pydantic import ConfigDict, model_validator

from flows.checks import require_metric, require_separate_rows
from flows.config import DELIVERED, GgufFiles, files_by_split
from flows.flow_config import FlowConfig
from flows.report import publish, show
from flows.stages import Stages
from flows.start import start
from flows.verdict import verdict_table
from tasks.core.import_inputs import import_files, import_model
from tasks.core.refs import GgufRef
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.task import evaluate
from tasks.gate import GateConfig
from tasks.gate.task import gate, require_passed
from tasks.gguf import GgufConfig
from tasks.gguf.task import convert
from tasks.ingest import IngestConfig
from tasks.ingest.task import ingest
from tasks.merge import MergeConfig
from tasks.merge.task import merge
from tasks.outliers import OutlierConfig
from tasks.outliers.task import find_outliers


class QuantizeConfig(FlowConfig):
    """One model to GGUF files, proven on your rows."""

    model_config = ConfigDict(title="Quantize")

    model: str
    """The model: a name on the Hugging Face hub or a local directory. Adapters are merged by the pipeline."""
    revision: str | None = None
    """Hub revision to pin."""
    train: str
    """Rows like those the model will meet: calibration rows for the importance matrix are taken from them."""
    test: str | None = None
    """Held-out rows that the model and every file are evaluated on; without it a part of `train` is held back."""
    ingest: IngestConfig = IngestConfig(allow_few_rows=True)
    outliers: OutlierConfig = OutlierConfig()
    merge: MergeConfig = MergeConfig()
    """Only `remedy` and its settings matter here; `none` skips the stage."""
    gguf: GgufFiles = [GgufConfig(kind=kind) for kind in DELIVERED]
    """The GGUF files to make, conversion of a kind."""
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig(student_points=None, gain_points=None)
    """How much a file may lose beside the model. There is no teacher and no base here to judge the model by."""

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        require_separate_rows(self.train, test=self.test)
        require_metric(self.gate, self.evaluate)
        for rule in ("student_points", "gain_points"):
            if getattr(self.gate, rule) is not None:
                raise ValueError(f"gate.{rule}: this flow evaluates no teacher and no base to judge by; set it to null")
        return self

    def unused_groups(self) -> dict[str, str]:
        """The remedy's settings without a remedy."""
        return {"merge": "merge.remedy is none; set it to rescale or clip"} if self.merge.remedy == "none" else {}


@flow(name="stillhouse-quantize", validate_parameters=True, persist_result=False)
def quantize(config: QuantizeConfig) -> dict[str, Any]:
    """Audits the model, makes every GGUF file, and evaluates all of them beside the model itself.

    Returns the summary that the report shows. Raises GateFailed, after the report, when a file lost too much.
    """
    with Stages(config) as run:
        model = run("import model", import_model, config.model, config.revision)
        files = run("import data", import_files, files_by_split(train=config.train, test=config.test))
        dataset = run("ingest", ingest, config.ingest, files, model)
        outliers = run("outliers", find_outliers, config.outliers, {"model": model}, dataset)
        verdict_table(run, outliers)
        source = model if config.merge.remedy == "none" else run("remedy", merge, config.merge, model, dataset)
        scores = {"model": run("evaluate model", evaluate, config.evaluate, model, dataset, "model")}
        delivered: dict[str, GgufRef] = {}
        for conversion in config.gguf:
            kind = conversion.kind
            gguf = run(f"gguf {kind}", convert, conversion, source, dataset, outliers=outliers)
            scores[kind] = run(f"evaluate {kind}", evaluate, config.evaluate, source, dataset, kind, gguf)
            delivered[kind] = gguf
        verdict = run.attempt("gate", gate, config.gate, {"student": scores["model"]} | _files(scores))
        summary = publish(run, dataset, scores, {"ingest": dataset, "outliers": outliers}, verdict, delivered=delivered)
        require_passed(verdict)
        return summary


def _files(scores: dict[str, Any]) -> dict[str, Any]:
    return {name: ref for name, ref in scores.items() if name != "model"}


if __name__ == "__main__":
    start(quantize, QuantizeConfig, show)
