"""The quickstart's student distilled plainly, on the grid of Q4_0 and with a smaller vocabulary; every file scored.

    python -m tests.benchmarks.grid WORK --teacher BASE+ADAPTER --dataset DIR [--seeds 5] [--only students|files]

Dataset and teacher are those of a quickstart run (the outputs of its ingest and teacher stages). `students` runs the
distill command for every student, all at once on a GPU; `files` runs the gguf and evaluate commands on what is there,
one after the other, and prints a row each: exact match of the student's own numbers in llama.cpp, and of its files.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STUDENT = Path(__file__).parents[2] / "deployments" / "quickstart" / "student"
DISTIL = {
    "method": "full", "learning_rate": 1e-3, "scheduler": "linear", "warmup_ratio": 0.06, "max_steps": 150,
    "batch_size": 32, "micro_batch_size": 32, "max_length": 256,
}  # fmt: skip
ALL = {"kind": "Q4_0", "imatrix": False, "embedding_type": "Q4_0"}
Q4_0 = {"kind": "Q4_0", "imatrix": False}
GRID = {"grid": "Q4_0", "grid_embedding": "Q4_0"}
# What is set in the student's training, and the files that are made of it, by name.
STUDENTS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "plain": ({}, {"BF16": {"kind": "BF16"}, "Q4_0": Q4_0, "all Q4_0": ALL}),
    "grid, all Q4_0": (GRID, {"F32": {"kind": "F32"}, "all Q4_0": ALL}),
    "grid, Q8_0 embedding": ({"grid": "Q4_0"}, {"F32": {"kind": "F32"}, "Q4_0": Q4_0}),
    "1400 pieces": ({"vocabulary": 1400}, {"BF16": {"kind": "BF16"}, "Q8_0": {"kind": "Q8_0"}, "all Q4_0": ALL}),
}


def start(stage: str, config: dict[str, Any], out: Path, **inputs: object) -> "subprocess.Popen[str]":
    """A stage's command; its messages go beside its output."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".json")
    file.write_text(json.dumps(config))
    options = [part for name, value in inputs.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", f"tasks.{stage}.run", str(file), *options, "--out", str(out)]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def students(work: Path, teacher: str, dataset: Path, seeds: int) -> None:
    """Every student of every seed, into WORK/NAME-SEED/student."""
    running: list[subprocess.Popen[str]] = []
    for name, (settings, _) in STUDENTS.items():
        for seed in range(seeds):
            inputs = {"student": STUDENT, "teacher": teacher, "dataset": dataset}
            child = start("distill", DISTIL | settings | {"seed": seed}, work / f"{name}-{seed}" / "student", **inputs)
            running.append(child)
            if not torch.cuda.is_available():
                child.wait()
    if any(child.wait() for child in running):
        sys.exit(f"a student failed: see {work}/*/student.log")


def files(work: Path, dataset: Path, seeds: int) -> None:
    """Files and their scores, for the students that are there."""
    for name, (_, kinds) in STUDENTS.items():
        for seed in range(seeds):
            directory = work / f"{name}-{seed}"
            if (directory / "student" / "report.json").is_file():
                row = [scored(directory, kind, config, dataset) for kind, config in kinds.items()]
                print(f"{name}, seed {seed}: {', '.join(row)}", flush=True)


def scored(directory: Path, kind: str, config: dict[str, Any], dataset: Path) -> str:
    """A file's exact match and size; what an earlier run made is taken as it is."""
    file, scores = directory / kind, directory / f"{kind} scores"
    shared: dict[str, object] = {"model": directory / "student", "dataset": dataset}
    asked = {"max_new_tokens": 72, "batch_size": 128, "latency_rows": 0, "perplexity_rows": 0, "text_tokens": 0}
    for stage, settings, out in (("gguf", config, file), ("evaluate", asked, scores)):
        inputs = shared | ({"gguf": file} if stage == "evaluate" else {})
        if not (out / "report.json").is_file() and start(stage, settings, out, **inputs).wait():
            sys.exit(f"{stage} failed: see {out.with_suffix('.log')}")
    exact = json.loads((scores / "report.json").read_text())["metrics"]["exact_match"]
    return f"{kind} {exact:.2%} ({(file / 'model.gguf').stat().st_size / 1e6:.2f} MB)"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=["students", "files"])
    arguments = parser.parse_args()
    if arguments.only != "files":
        students(arguments.work, arguments.teacher, arguments.dataset, arguments.seeds)
    if arguments.only != "students":
        files(arguments.work, arguments.dataset, arguments.seeds)
