"""What a stage leaves in MLflow: its settings, its data, its final numbers, its pictures, the files it delivers."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.core.config import StageConfig
from tasks.core.mlflow_run import Run
from tasks.core.refs import AdapterRef, DatasetRef, GgufRef, ModelRef, ReportRef
from tasks.core.settings import Settings
from tasks.core.store import Store
from tasks.core.tracking import Tracker

Made = DatasetRef | ModelRef | AdapterRef | GgufRef | ReportRef
SAMPLING_SECONDS = 5


def record_inputs(run: Run, config: StageConfig, inputs: Mapping[str, Any]) -> None:
    """The stage's config as params, its inputs' digests as tags, its dataset as an MLflow dataset."""
    run.params(config.model_dump(mode="json"))
    for name, ref in inputs.items():
        if isinstance(ref, Mapping):
            run.tags(**{f"input.{name}.{key}": one.digest for key, one in ref.items()})
        else:
            run.tags(**{f"input.{name}": ref.digest})
            if isinstance(ref, DatasetRef):
                run.dataset(name, ref.digest, ref.uri, {key: value for key, value in ref.facts.items()})


def record_output(run: Run, store: Store, made: Made, out: Path, label: str) -> None:
    """Final metrics, `report.json`, `provenance.json` and everything below `report/`; a GGUF becomes a version."""
    report = json.loads((out / "report.json").read_text())
    run.metrics(0, {f"final/{name}": value for name, value in report["metrics"].items()})
    run.tags(digest=made.digest, store=made.uri, kind=made.kind)
    for name in ("report.json", "provenance.json", "report"):
        if (out / name).exists():
            run.artifacts(out / name, "report" if name == "report" else None)
    if isinstance(made, GgufRef):
        run.register("stillhouse-" + label.replace(" ", "-"), _source(store, made.digest), made.digest)
    run.flush()


def record_failed(tracker: Tracker, run: Run, report: Path) -> None:
    """What a command had written for people before it failed; on this machine it is overwritten by the next try."""
    if report.is_dir():
        run.artifacts(report, "report")
        if link := tracker.link(run):
            tracker.warn(f"what it wrote before it failed is in MLflow: {link}/artifacts/report")


def record_cached(tracker: Tracker, store: Store, label: str, config: StageConfig, made: Made) -> None:
    """A stage found in the cache: its settings and final numbers, and its whole history if MLflow never saw it."""
    seen = tracker.seen(made.digest)
    with tracker.stage(label) as run:
        run.tags(cached="true", digest=made.digest, **({"made_by": seen} if seen else {}))
        run.params(config.model_dump(mode="json"))
        if seen:
            run.metrics(
                0, {f"final/{name}": float(value) for name, value in made.facts.items() if not isinstance(value, str)}
            )
            return
        with tempfile.TemporaryDirectory() as directory:
            out = store.fetch(made.digest, Path(directory) / "out")
            events = out / "report" / "events.jsonl"
            for line in events.read_text().splitlines() if events.exists() else []:
                event = json.loads(line)
                if event["event"] == "metrics":
                    run.metrics(event["step"], event["values"], event["time"])
            record_output(run, store, made, out, label)


@contextmanager
def system_metrics(run: Run, settings: Settings) -> Iterator[None]:
    """CPU, memory, disk and, with NVML, GPU use while the block runs, as MLflow's system metrics."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415

    if run.run_id is None:
        yield
        return
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it tells of every start and stop
    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=SAMPLING_SECONDS, resume_logging=True, tracking_uri=settings.tracking_uri
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _source(store: Store, digest: str) -> str:
    """Where the GGUF's bytes are."""
    gguf = next(file for file in store.manifest(digest).files if file.name == "model.gguf")
    return f"{store.uri}/{gguf.key}"
