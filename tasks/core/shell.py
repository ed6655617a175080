"""The shell around every stage's command, the only place where Prefect, the store, MLflow and the child meet.

Refs in; the cache is asked; inputs are fetched; the command runs in a child process while the GPU slot is held; its
output is published; a ref goes out. A stage's task is three lines around `run_stage`.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

from prefect import get_run_logger
from prefect.runtime import task_run
from prefect.states import Completed

from tasks.core.cache import cache_key
from tasks.core.child import run_command
from tasks.core.config import StageConfig
from tasks.core.errors import OutOfMemory, StageError
from tasks.core.gpu_slot import gpu_slot
from tasks.core.inputs import fetched, in_use
from tasks.core.mlflow_record import record_cached, record_failed, record_inputs, record_output, system_metrics
from tasks.core.mlflow_run import Run
from tasks.core.progress import ProgressView
from tasks.core.refs import AdapterRef, DatasetRef, FilesRef, GgufRef, ModelDir, ModelRef, ReportRef
from tasks.core.settings import Settings
from tasks.core.store import Store, open_store
from tasks.core.tracking import tracker

AnyRef = FilesRef | DatasetRef | ModelRef | AdapterRef | GgufRef | ReportRef
Input = AnyRef | Mapping[str, AnyRef] | None
MOST_RUNGS = 16  # a training's ladder ends before, with its own error; other stages only halve their batch
R = TypeVar("R", DatasetRef, ModelRef, AdapterRef, GgufRef, ReportRef)
_USE: ContextVar[str | None] = ContextVar("use", default=None)


@contextmanager
def used_as(name: str) -> Iterator[None]:
    """What a flow calls its use of a stage instead of the task's own label, so that two uses are two MLflow runs."""
    token = _USE.set(name)
    try:
        yield
    finally:
        _USE.reset(token)


def run_stage(
    stage: str,
    config: StageConfig,
    inputs: Mapping[str, Input],
    kind: type[R],
    label: str,
    helps: Mapping[str, Input] | None = None,
    **fields: Any,
) -> R:
    """Runs `python -m tasks.<stage>.run` on `inputs`, or finds its output made before, and returns a `kind` ref.

    `label` names this use of the stage in MLflow and Prefect ("evaluate student") where `used_as` does not; `fields`
    are further fields of the ref. `helps` are inputs that save work and do not decide the output: they are not in its
    key. A cache hit is a Prefect state named `Cached`, which Prefect unwraps. Raises the typed errors of
    `tasks.core.errors`.
    """
    label = _USE.get() or label
    settings = Settings()
    store = open_store(settings.store_uri)
    given = {name: value for name, value in inputs.items() if value}
    key = cache_key(stage, config, given)
    scratch = settings.root / "scratch" / f"{stage}-{key[:16]}"
    warn = get_run_logger().warning
    with in_use(settings), _alone(scratch):
        made = _cached(store, stage, key, kind)
        if made is not None:
            record_cached(tracker(settings, warn), store, label, config, made)
            return cast(R, Completed(name="Cached", message=f"{label}: {stage}/{key[:16]}", data=made))
        with tracker(settings, warn).stage(label) as run, ProgressView(label, get_run_logger()) as view:
            record_inputs(run, config, given)
            helping = {name: ref for name, ref in (helps or {}).items() if ref}
            try:
                _run(stage, config, {**given, **helping}, scratch, run, view, settings)
            except StageError:
                record_failed(tracker(settings, warn), run, scratch / "out" / "report")
                raise
            made = _publish(store, scratch / "out", kind, fields, view)
            record_output(run, store, made, scratch / "out", label)
            store.write_index(stage, key, made.model_dump(mode="json"))
        if not settings.keep_scratch:
            shutil.rmtree(scratch)
    return made


def _cached(store: Store, stage: str, key: str, kind: type[R]) -> R | None:
    entry = store.read_index(stage, key)
    if entry is None:
        return None
    made = kind.model_validate(entry)
    return made if store.has(made.digest) else None  # a deleted artifact is made again


def _run(
    stage: str, config: StageConfig, inputs: Mapping[str, Input], scratch: Path, run: Run, view: ProgressView,
    settings: Settings,
) -> None:  # fmt: skip
    """The command, from fetching its inputs to its exit; after an out-of-memory error again at once, a rung lower."""
    work, rung = scratch / "work", scratch / "rung"
    if work.exists():
        rungs = rung.read_text() if rung.exists() else "0"
        run.tags(**{f"attempt.{task_run.get_run_count() or 1}": f"taken up again, {rungs} rungs down"})
    (scratch / "config.json").write_text(config.model_dump_json(indent=1))
    arguments = [str(scratch / "config.json"), *_options(inputs, settings, view)]
    arguments += ["--out", str(scratch / "out"), "--work", str(work)]
    with gpu_slot(settings, get_run_logger()), system_metrics(run, settings):

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "metrics":
                run.metrics(event["step"], event["values"], event["time"])
            elif event["event"] == "tags":
                run.tags(**event["values"])
            view.event(event)

        def start(rungs: int) -> None:
            run_command(
                f"tasks.{stage}.run",
                [*arguments, "--rung", str(rungs)],
                work,
                on_event,
                settings.stall_seconds,
                settings.timeout_seconds,
                settings.warm,
                getattr(config, "processes", 1),
            )

        descend(start, rung, run, get_run_logger().warning)


def descend(start: Callable[[int], None], rung: Path, run: Run, warn: Callable[[str], None]) -> None:
    """Calls `start(rungs)` until it does not run out of memory, one rung lower each time; `rung` remembers how many.

    What a rung gives up is the command's own business (tasks.core.memory_fallback), which ends the descent with its
    own error.
    """
    rungs = int(rung.read_text()) if rung.exists() else 0
    while True:
        try:
            return start(rungs)
        except OutOfMemory as error:
            rungs += 1
            rung.write_text(str(rungs))
            run.tags(**{f"out_of_memory.{rungs}": str(error)[:500]})
            warn(f"{str(error)[:500]}; again from its last checkpoint, {rungs} rungs down")
            if rungs > MOST_RUNGS:
                raise


def _options(inputs: Mapping[str, Input], settings: Settings, view: ProgressView) -> Iterator[str]:
    """The inputs as options of the command: fetched, verified, `--name DIR` or `--name NAME=DIR` for each of many."""

    def directory(ref: AnyRef) -> ModelDir:
        own = fetched(settings, ref.digest, view.progress)
        if isinstance(ref, AdapterRef):
            return ModelDir(fetched(settings, ref.base.digest, view.progress), own)
        return ModelDir(own)

    for name, value in inputs.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, Mapping):
            for key, ref in value.items():
                yield from (option, f"{key}={directory(ref)}")
        elif value is not None:
            yield from (option, str(directory(value)))


def _publish(store: Store, out: Path, kind: type[R], fields: Mapping[str, Any], view: ProgressView) -> R:
    report = json.loads((out / "report.json").read_text())
    for warning in report["warnings"]:
        get_run_logger().warning(warning)
    (out / "report").mkdir(exist_ok=True)
    shutil.copy(out.parent / "work" / "events.jsonl", out / "report" / "events.jsonl")
    return kind(uri=store.uri, digest=store.put(out, view.progress), facts=report["facts"], **fields)


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """Two runs on this host that want the same output: the second waits, and then finds it made."""
    scratch.mkdir(parents=True, exist_ok=True)
    with scratch.with_name(scratch.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            get_run_logger().info("another run on this host is making %s: waiting for it", scratch.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
