"""The quickstart's distillation on the CPU."""

import json
import time
from pathlib import Path
from typing import Any

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.distill import DistillConfig
from tasks.distill.teacher_cache.cache_files import CacheLayout
from tasks.distill.teacher_cache.teacher_pass import TeacherPass, cache_rows
from tasks.engine.data.chat_template import encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.load import load_model
from tests.benchmarks.distill.ours import ours
from tests.benchmarks.distill.peers import peer_steps


def quickstart(directory: Path, count: int = 192) -> None:
    """Seconds a step of 32 rows, all of the student trained; ours with its share of the teacher's one pass."""
    base = Path("deployments/quickstart")
    tokenizer = load_tokenizer(ModelDir(base / "student"))
    lines = (base / "data" / "train.jsonl").read_text().splitlines()[:count]
    rows = []
    for line in map(json.loads, lines):
        turns = zip(("user", "assistant"), (line["instruction"] + line["input"], line["output"]), strict=True)
        rows.append(encode(tokenizer, Row(messages=[Message(role=role, content=text) for role, text in turns])))

    def loaded(name: str) -> Any:
        return load_model(ModelDir(base / name), "float32")

    width = loaded("teacher").config.hidden_size
    teacher_pass = TeacherPass(
        lambda: loaded("teacher"), "quickstart", CacheLayout(width, "float32"), DistillConfig().teacher_cache
    )
    start = time.perf_counter()
    states = cache_rows(teacher_pass, rows, None, directory / "states", Job(directory / "job"))
    asked = (time.perf_counter() - start) / count * 32
    steps = count // 32
    run = ours(states, rows, steps, 32, 32, student=lambda: loaded("student"))
    print(f"| ours | {run['median'] / 1e3:.2f} s a step, and once {asked:.2f} s for its rows' states", flush=True)
    for name, together in (("the seeds' loop", 1), ("full logits, batched", 32)):
        step = peer_steps(name, loaded("student"), loaded("teacher").requires_grad_(False), rows, 32)
        step(0)
        start = time.perf_counter()
        for i in range(1, 3):
            step(i)
        print(f"| {name}, {together} together | {(time.perf_counter() - start) / 2:.2f} s a step", flush=True)
