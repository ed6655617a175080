"""The stage and the teacher's pass run with a few settings, and what they told."""

import json
from pathlib import Path

from tasks.core.command import Report
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.run import distil
from tasks.distill.teacher_cache import StatesConfig
from tasks.distill.teacher_cache.run import remember

SETTINGS = dict(rank=4, learning_rate=5e-3, batch_size=8, micro_batch_size=8, max_steps=12)


def kept(directory: Path, teacher: ModelDir, dataset: Path, known: Path | None = None, **settings) -> Path:
    remember(StatesConfig(**settings), teacher, dataset, directory, Job(directory / "work"), known)
    return directory


def run(student: ModelDir, teacher: ModelDir, dataset: Path, directory: Path, states=None, **settings) -> Report:
    out = directory / "out"
    out.mkdir(parents=True)
    config = DistillConfig(**(SETTINGS | settings))
    return distil(config, student, teacher, dataset, out, Job(directory / "work"), states=states)


def events(work: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (work / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def steps(work: Path) -> list[dict[str, float]]:
    return [e["values"] for e in events(work, "metrics") if "grad_norm" in e["values"]]
