"""The engine's own trainer on states of the teacher."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tasks.core.job import Job
from tasks.distill import DistillConfig
from tasks.distill.run import WINDOW, objective
from tasks.distill.teacher_cache.cache_files import CacheLayout, TeacherCache
from tasks.distill.teacher_cache.teacher_pass import TeacherPass, cache_rows
from tasks.distill.teacher_targets import TeacherTargets
from tasks.distill.teachers import CachedTeacher
from tasks.engine.data.chat_template import Example
from tasks.engine.losses.loss_mix import LossMix
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.train import train
from tests.benchmarks.distill.shapes import CE, DEVICE, KD, SHAPES, T, fresh, model, peak_gib, sync


def states_of(rows: list[Example], directory: Path) -> tuple[TeacherCache, float]:
    """The teacher run once over the rows, and the seconds it took, from its loading on the device to the files."""
    config = DistillConfig().teacher_cache
    teacher = model("teacher", torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()
    dtype = str(teacher.dtype).removeprefix("torch.")
    kept = CacheLayout(SHAPES["teacher"][0], dtype)
    job = Job(directory / "job")
    sync()
    start = time.perf_counter()
    found = cache_rows(TeacherPass(lambda: teacher, "bench", kept, config), rows, None, directory / "states", job)
    return found, time.perf_counter() - start


def ours(
    states: TeacherCache, rows: list[Example], steps: int, batch: int, micro: int,
    validation: list[Example] | None = None, student: Callable[[], Any] | None = None,
    layers: str = "ours", **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run of the engine's trainer: ms a step by its event times, peak GiB, the spec and its model.

    `layers` "transformers" keeps the model's own layers where ours would fit.
    """
    fresh()
    settings = dict(epochs=1, batch_size=batch, micro_batch_size=micro, max_steps=steps, learning_rate=1e-4,
                    warmup_ratio=0, save_every_seconds=1e9, scheduler="constant", compile="off") | settings  # fmt: skip
    config = DistillConfig(**settings)
    everything = [*rows, *(validation or [])]
    targets = TeacherTargets(rows, CachedTeacher(states, everything, T))
    with tempfile.TemporaryDirectory() as work:
        job = Job(Path(work))
        spec = TrainingSpec(
            build=student or (lambda: model("student", torch.float32)), examples=rows, validation=validation or [],
            objective=objective(targets, LossMix(KD, CE, T), None, config.loss_chunk_mib << 20), config=config, job=job,
            fingerprint="bench", prepare_batch=targets.teacher.prepare_batch, window=WINDOW,
        )  # fmt: skip
        with no_checkpoints(), no_stack() if layers == "transformers" else contextlib.nullcontext():
            start = time.perf_counter()
            trained, history = train(spec)
            whole = time.perf_counter() - start
        peak = peak_gib()
        events = [json.loads(line) for line in (Path(work) / "events.jsonl").read_text().splitlines()]
    times = [e["time"] for e in events if e["event"] == "metrics" and "grad_norm" in e["values"]]
    skip = min(len(times) - 3, max(3, len(times) // 3))
    told = times[skip:-1]  # the last step is told when the run has ended, after more than a step
    mean = (told[-1] - told[0]) / (len(told) - 1)
    gaps = sorted(b - a for a, b in zip(told, told[1:], strict=False))
    return {"ms": mean * 1e3, "median": gaps[len(gaps) // 2] * 1e3, "peak": peak, "spec": spec, "model": trained,
            "times": times, "history": history, "first": times[skip] - times[0], "whole": whole}  # fmt: skip


@contextlib.contextmanager
def no_checkpoints() -> Any:
    """The last step's checkpoint is left out: 4 GB of random weights."""
    from tasks.engine.training import checkpoint

    written, checkpoint.write = checkpoint.write, lambda *_, **__: Path()
    yield
    checkpoint.write = written


@contextlib.contextmanager
def no_stack() -> Any:
    """The model's own layers."""
    from tasks.engine.speed import cuda_graphs

    decoder, cuda_graphs.Gemma3Decoder = (
        cuda_graphs.Gemma3Decoder,
        type("None", (), {"of": staticmethod(lambda *_: None)}),
    )  # type: ignore[misc]
    yield
    cuda_graphs.Gemma3Decoder = decoder  # type: ignore[misc]
