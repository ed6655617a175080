"""Records a stage in MLflow: its settings, inputs, final metrics, report files and the models it delivers."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.core.config import StageConfig
from tasks.core.mlflow_run import Run
from tasks.core.refs import DatasetRef, GgufRef, OutputRef
from tasks.core.settings import Settings
from tasks.core.store import Store
from tasks.core.tracking import Tracker

SAMPLING_SECONDS = 5


def record_inputs(run: Run, config: StageConfig, inputs: Mapping[str, Any]) -> None:
    """Logs the stage's config as params, its inputs' digests as tags, its dataset as an MLflow dataset."""
    run.params(config.model_dump(mode="json"))
    for name, ref in inputs.items():
        if isinstance(ref, Mapping):
            run.tags(**{f"input.{name}.{key}": value.digest for key, value in ref.items()})
        else:
            run.tags(**{f"input.{name}": ref.digest})
            if isinstance(ref, DatasetRef):
                run.dataset(name, ref.digest, ref.uri, {key: value for key, value in ref.facts.items()})


def record_output(run: Run, store: Store, output: OutputRef, out: Path, label: str) -> None:
    """Logs final metrics, `report.json`, `provenance.json` and `report/`; registers a GGUF as a model's version."""
    report = json.loads((out / "report.json").read_text())
    run.metrics(0, {f"final/{name}": value for name, value in report["metrics"].items()})
    run.tags(digest=output.digest, store=output.uri, kind=output.kind)
    for name in ("report.json", "provenance.json", "report"):
        if (out / name).exists():
            run.artifacts(out / name, "report" if name == "report" else None)
    if isinstance(output, GgufRef):
        run.register("stillhouse-" + label.replace(" ", "-"), _gguf_uri(store, output.digest), output.digest)
    run.flush()


def record_failed(tracker: Tracker, run: Run, report: Path) -> None:
    """Logs the report files of a command that failed, which the next try overwrites on this machine."""
    if report.is_dir():
        run.artifacts(report, "report")
        if link := tracker.link(run):
            tracker.warn(f"its report files are in MLflow: {link}/artifacts/report")


def record_cached(tracker: Tracker, store: Store, label: str, config: StageConfig, output: OutputRef) -> None:
    """Records a stage whose output was cached: settings and final metrics, and all metrics where MLflow has none."""
    earlier_run = tracker.recorded_in(output.digest)
    with tracker.stage(label) as run:
        run.tags(cached="true", digest=output.digest, **({"made_by": earlier_run} if earlier_run else {}))
        run.params(config.model_dump(mode="json"))
        if earlier_run:
            numbers = {name: float(value) for name, value in output.facts.items() if not isinstance(value, str)}
            run.metrics(0, {f"final/{name}": value for name, value in numbers.items()})
            return
        with tempfile.TemporaryDirectory() as directory:
            out = store.fetch(output.digest, Path(directory) / "out")
            events = out / "report" / "events.jsonl"
            for line in events.read_text().splitlines() if events.exists() else []:
                event = json.loads(line)
                if event["event"] == "metrics":
                    run.metrics(event["step"], event["values"], event["time"])
            record_output(run, store, output, out, label)


@contextmanager
def system_metrics(run: Run, settings: Settings) -> Iterator[None]:
    """Logs CPU, memory, disk and, with NVML, GPU use while the block runs, as MLflow's system metrics."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415

    if run.run_id is None:
        yield
        return
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it logs every start and stop
    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=SAMPLING_SECONDS, resume_logging=True, tracking_uri=settings.tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _gguf_uri(store: Store, digest: str) -> str:
    """The URI of the GGUF's blob."""
    gguf = next(file for file in store.manifest(digest).files if file.name == "model.gguf")
    return f"{store.uri}/{gguf.key}"
