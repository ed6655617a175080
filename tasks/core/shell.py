"""The shell around every stage's command, the only place where Prefect, the store, MLflow and the child meet.

Refs in; the cache is looked up; inputs are fetched; the command runs in a child process while the GPU slot is held; its
output is stored; a ref comes out. A stage's task is three lines around `run_stage`.
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
from tasks.core.child_process import run_command
from tasks.core.config import StageConfig
from tasks.core.errors import OutOfMemory, StageError
from tasks.core.gpu_slot import gpu_slot
from tasks.core.inputs import fetch_input, inputs_in_use
from tasks.core.mlflow_record import record_cached, record_failed, record_inputs, record_output, system_metrics
from tasks.core.mlflow_run import Run
from tasks.core.progress import ProgressView
from tasks.core.refs import AdapterRef, DatasetRef, GgufRef, ModelDir, ModelRef, Ref, ReportRef
from tasks.core.settings import Settings
from tasks.core.store import Store, open_store
from tasks.core.tracking import tracker

Input = Ref | Mapping[str, Ref] | None
MAX_MEMORY_LEVEL = 16  # training's fallback ends before, with its own error; other stages only halve their batch
R = TypeVar("R", DatasetRef, ModelRef, AdapterRef, GgufRef, ReportRef)
_LABEL: ContextVar[str | None] = ContextVar("label", default=None)


@contextmanager
def stage_label(name: str) -> Iterator[None]:
    """Replaces the label of the stages that run in the block, so that a flow's two uses are two MLflow runs."""
    token = _LABEL.set(name)
    try:
        yield
    finally:
        _LABEL.reset(token)


def run_stage(
    stage: str,
    config: StageConfig,
    inputs: Mapping[str, Input],
    kind: type[R],
    label: str,
    unkeyed_inputs: Mapping[str, Input] | None = None,
    **fields: Any,
) -> R:
    """Runs `python -m tasks.<stage>.run` on `inputs`, or finds its cached output, and returns a ref of type `kind`.

    `label` names this use of the stage in MLflow and Prefect ("evaluate student") unless `stage_label` does; `fields`
    are further fields of the ref. `unkeyed_inputs` save work and do not change the output: they are not in its cache
    key. A cache hit is a Prefect state named `Cached`, which Prefect unwraps. Raises the typed errors of
    `tasks.core.errors`.
    """
    label = _LABEL.get() or label
    settings = Settings()
    store = open_store(settings.store_uri)
    refs = {name: value for name, value in inputs.items() if value}
    key = cache_key(stage, config, refs)
    scratch = settings.root / "scratch" / f"{stage}-{key[:16]}"
    warn = get_run_logger().warning
    with inputs_in_use(settings), _output_lock(scratch):
        cached = _cached(store, stage, key, kind)
        if cached is not None:
            record_cached(tracker(settings, warn), store, label, config, cached)
            return cast(R, Completed(name="Cached", message=f"{label}: {stage}/{key[:16]}", data=cached))
        with tracker(settings, warn).stage(label) as run, ProgressView(label, get_run_logger()) as view:
            record_inputs(run, config, refs)
            unkeyed_refs = {name: value for name, value in (unkeyed_inputs or {}).items() if value}
            try:
                _run(stage, config, {**refs, **unkeyed_refs}, scratch, run, view, settings)
            except StageError:
                record_failed(tracker(settings, warn), run, scratch / "out" / "report")
                raise
            output = _publish(store, scratch / "out", kind, fields, view)
            record_output(run, store, output, scratch / "out", label)
            store.write_index(stage, key, output.model_dump(mode="json"))
        if not settings.keep_scratch:
            shutil.rmtree(scratch)
    return output


def _cached(store: Store, stage: str, key: str, kind: type[R]) -> R | None:
    """The ref in the stage cache; None without one, or when its artifact was deleted: then the stage runs again."""
    entry = store.read_index(stage, key)
    if entry is None:
        return None
    ref = kind.model_validate(entry)
    return ref if store.has(ref.digest) else None


def _run(
    stage: str, config: StageConfig, inputs: Mapping[str, Input], scratch: Path, run: Run, view: ProgressView,
    settings: Settings,
) -> None:  # fmt: skip
    """Fetches the inputs and runs the command; again at the next memory fallback level when it runs out of memory."""
    work, level_file = scratch / "work", scratch / "memory_level"
    if work.exists():
        level = level_file.read_text() if level_file.exists() else "0"
        run.tags(**{f"attempt.{task_run.get_run_count() or 1}": f"continued at memory fallback level {level}"})
    (scratch / "config.json").write_text(config.model_dump_json(indent=1))
    arguments = [str(scratch / "config.json"), *_input_options(inputs, settings, view)]
    arguments += ["--out", str(scratch / "out"), "--work", str(work)]
    with gpu_slot(settings, get_run_logger()), system_metrics(run, settings):

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "metrics":
                run.metrics(event["step"], event["values"], event["time"])
            elif event["event"] == "tags":
                run.tags(**event["values"])
            view.event(event)

        def start(level: int) -> None:
            run_command(
                f"tasks.{stage}.run",
                [*arguments, "--memory-level", str(level)],
                work,
                on_event,
                settings.stall_seconds,
                settings.timeout_seconds,
                settings.warm,
                getattr(config, "processes", 1),
            )

        retry_out_of_memory(start, level_file, run, get_run_logger().warning)


def retry_out_of_memory(start: Callable[[int], None], level_file: Path, run: Run, warn: Callable[[str], None]) -> None:
    """Calls `start(level)` until it does not run out of memory, one level higher each time; `level_file` keeps it.

    What changes with a level is the command's own business (tasks.core.memory_fallback), which raises its own error
    below the last one.
    """
    level = int(level_file.read_text()) if level_file.exists() else 0
    while True:
        try:
            return start(level)
        except OutOfMemory as error:
            level += 1
            level_file.write_text(str(level))
            run.tags(**{f"out_of_memory.{level}": str(error)[:500]})
            warn(f"{str(error)[:500]}; again from its last checkpoint, at memory fallback level {level}")
            if level > MAX_MEMORY_LEVEL:
                raise


def _input_options(inputs: Mapping[str, Input], settings: Settings, view: ProgressView) -> Iterator[str]:
    """Fetches the inputs and yields the command's options: `--name DIR`, or `--name KEY=DIR` for each of a mapping."""

    def directory(ref: Ref) -> ModelDir:
        path = fetch_input(settings, ref.digest, view.progress)
        if isinstance(ref, AdapterRef):
            return ModelDir(fetch_input(settings, ref.base.digest, view.progress), path)
        return ModelDir(path)

    for name, value in inputs.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, Mapping):
            for key, ref in value.items():
                yield from (option, f"{key}={directory(ref)}")
        elif value is not None:
            yield from (option, str(directory(value)))


def _publish(store: Store, out: Path, kind: type[R], fields: Mapping[str, Any], view: ProgressView) -> R:
    """Stores the output directory with the command's events, logs its warnings, and returns its ref."""
    report = json.loads((out / "report.json").read_text())
    for warning in report["warnings"]:
        get_run_logger().warning(warning)
    (out / "report").mkdir(exist_ok=True)
    shutil.copy(out.parent / "work" / "events.jsonl", out / "report" / "events.jsonl")
    return kind(uri=store.uri, digest=store.put(out, view.progress), facts=report["facts"], **fields)


@contextmanager
def _output_lock(scratch: Path) -> Iterator[None]:
    """Lets one run at a time on this host make an output; another run waits, and then finds it in the cache."""
    scratch.mkdir(parents=True, exist_ok=True)
    with scratch.with_name(scratch.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            get_run_logger().info("another run on this host is making %s: waiting for it", scratch.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
