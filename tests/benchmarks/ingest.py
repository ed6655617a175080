"""Ingest against `datasets` (load, map with two processes, drop duplicates, split, save), both in this one run.

python -m tests.benchmarks.ingest                           # 500 000 rows, both loops twice, one after the other
python -m tests.benchmarks.ingest --extras                  # the same rows with near duplicates, with a tokenizer
python -m tests.benchmarks.ingest --rows 5000000 --ours     # seconds and memory of ten times the rows
python -m tests.benchmarks.ingest --rows 5000000 --ours --near

Rows are Alpaca's, 267 MB in 500 000. Memory is the largest sum of the resident sets of the command and its workers.
CPU seconds are those of the command and its workers: on a machine with other work they say more than the clock.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psutil

POOL = 20_000
TOKENIZER = Path(__file__).parents[2] / "deployments/quickstart/teacher"


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def _cpu() -> float:
    """CPU seconds of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_rows(path: Path, count: int) -> None:
    """Alpaca rows of 534 bytes on average: shuffled wordings, each with a number that makes it its own."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(random.choices(words, k=random.randint(low, high)))

    pool = [(text(8, 24), text(1, 20) if random.random() < 0.4 else "", text(20, 90)) for _ in range(POOL)]
    with path.open("w", buffering=1 << 20) as file:
        for number in range(count):
            (asked, _, _), (_, given, _), (_, _, told) = (pool[random.randrange(POOL)] for _ in range(3))
            file.write(f'{{"instruction":"{asked} {number}?","input":"{given}","output":"{told}"}}\n')


def measured(command: list[str], environment: dict[str, str] | None = None) -> Cost:
    """Seconds and memory of a command and its children; fails when it fails.

    What was written before is on the disk first, or the one would wait for the other's files.
    """
    os.sync()
    start, cpu, peak = time.perf_counter(), _cpu(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, _resident(watched))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode()[-2000:])
    return Cost(seconds, _cpu() - cpu, peak)


def _resident(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def ours(rows: Path, work: Path, tokenizer: bool = False, **config: Any) -> Cost:
    """The stage's command as a run starts it."""
    (work / "config.json").write_text(json.dumps(config))
    shutil.rmtree(work / "out.work", ignore_errors=True)
    command = [sys.executable, "-m", "tasks.ingest.run", str(work / "config.json"), "--files", str(rows)]
    command += ["--tokenizer", str(TOKENIZER)] if tokenizer else []
    return measured([*command, "--out", str(work / "out")])


def theirs(rows: Path, work: Path) -> Cost:
    """This file again, as a process of its own that runs `datasets_loop`."""
    shutil.rmtree(work / "hf", ignore_errors=True)
    environment = {**os.environ, "HF_HOME": str(work / "hf"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return measured(
        [sys.executable, "-m", "tests.benchmarks.ingest", "--loop", str(rows), str(work / "hf")], environment
    )


def canonical(row: dict[str, str]) -> dict[str, Any]:
    import hashlib

    asked = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return {
        "messages": turns,
        "hash": hashlib.blake2b((asked + "\0" + row["output"]).encode(), digest_size=8).hexdigest(),
    }


def datasets_loop(rows: str, out: str) -> None:
    from datasets import load_dataset

    found = load_dataset("json", data_files=rows, split="train")
    found = found.map(canonical, num_proc=2, remove_columns=found.column_names)
    seen: set[str] = set()
    found = found.filter(lambda hashes: [_new(one, seen) for one in hashes], input_columns="hash", batched=True)
    found.train_test_split(test_size=0.1, seed=0).save_to_disk(f"{out}/saved")


def _new(value: str, seen: set[str]) -> bool:
    known = value in seen
    seen.add(value)
    return not known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--ours", action="store_true", help="not the loop of datasets")
    parser.add_argument("--near", action="store_true", help="look for near duplicates too")
    parser.add_argument("--extras", action="store_true", help="near duplicates and tokens, each for itself")
    parser.add_argument("--loop", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        datasets_loop(*arguments.loop)
        return
    print(" ".join(f"{name} {version(name)}" for name in ("orjson", "polars", "rensa", "datasets")), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        work, rows = Path(directory), Path(directory) / "rows.jsonl"
        write_rows(rows, arguments.rows)
        print(f"{arguments.rows} rows, {rows.stat().st_size / 1e6:.0f} MB", flush=True)
        near = {"near_duplicates": "drop"} if arguments.near else {}
        if arguments.ours:
            _show("ingest, near duplicates too" if near else "ingest", ours(rows, work, **near), arguments.rows)
        elif arguments.extras:
            _show("ingest", ours(rows, work), arguments.rows)
            _show("ingest, near duplicates too", ours(rows, work, near_duplicates="drop"), arguments.rows)
            _show("ingest with a tokenizer, no row over max_length", ours(rows, work, tokenizer=True), arguments.rows)
        else:
            for _ in range(2):
                mine, other = ours(rows, work), theirs(rows, work)
                _show("ingest", mine, arguments.rows)
                _show("datasets", other, arguments.rows)
                faster, less = other.seconds / mine.seconds, other.cpu_seconds / mine.cpu_seconds
                print(f"{faster:.1f} times as fast, {less:.1f} times less CPU", flush=True)


def _show(name: str, cost: Cost, rows: int) -> None:
    cpu = f"{cost.cpu_seconds:6.1f} CPU s ({cost.cpu_seconds / rows * 1e6:.1f} us a row)"
    print(f"{name:48} {cost.seconds:6.1f} s {cpu} {cost.peak_bytes / 1e9:5.2f} GB", flush=True)


if __name__ == "__main__":
    main()
