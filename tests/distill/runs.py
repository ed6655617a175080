"""Runs of the distill stage and of the teacher cache with a few settings, and their events."""

import json
from pathlib import Path

from tasks.core.command import Report
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.run import distil
from tasks.distill.teacher_cache import TeacherCacheConfig
from tasks.distill.teacher_cache.run import cache_teacher

SETTINGS = dict(rank=4, learning_rate=5e-3, batch_size=8, micro_batch_size=8, max_steps=12)


def cached(directory: Path, teacher: ModelDir, dataset: Path, previous: Path | None = None, **settings) -> Path:
    cache_teacher(TeacherCacheConfig(**settings), teacher, dataset, directory, Job(directory / "work"), previous)
    return directory


def run(
    student: ModelDir, teacher: ModelDir, dataset: Path, directory: Path, cache: Path | None = None, **settings
) -> Report:
    out = directory / "out"
    out.mkdir(parents=True)
    config = DistillConfig(**(SETTINGS | settings))
    return distil(config, student, teacher, dataset, out, Job(directory / "work"), teacher_cache=cache)


def events(work: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (work / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def steps(work: Path) -> list[dict[str, float]]:
    return [e["values"] for e in events(work, "metrics") if "grad_norm" in e["values"]]
