"""Out of memory for real: a lid on the process's memory, memory fallback levels, and MLflow's record of them."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.core import child_process
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.core.settings import Settings
from tasks.core.shell import retry_out_of_memory
from tasks.core.tracking import Tracker
from tasks.teacher import FineTuneConfig
from tests.engine.rows import example_dataset
from tests.pico import pico_model
from tests.rows import write_rows

# The MLP is the memory: 8192 wide in float32, so that 64 rows of 50 tokens take 100 MiB each time it is kept.
SETTINGS = dict(rank=2, batch_size=64, micro_batch_size=64, max_steps=3, save_every_steps=1, loss_chunk_mib=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32, intermediate_size=8192))


def descended(base, tmp_path: Path, monkeypatch, cap: int, dataset: Path | None = None, **settings):
    """The run's tags in MLflow, its events, and the step of the checkpoint it went on from."""
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CAP_MIB", str(cap))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dataset, work, events, warnings = dataset or example_dataset(tmp_path / "dataset"), tmp_path / "work", [], []
    config = tmp_path / "config.json"
    config.write_text(FineTuneConfig(**(SETTINGS | settings)).model_dump_json())
    arguments = [str(config), "--base", str(base.base), "--dataset", str(dataset), "--out", str(tmp_path / "out")]
    tracker = Tracker("flow", "otter", Settings(), pytest.fail)
    with tracker.stage("teacher") as run:

        def on_event(event) -> None:
            if event["event"] == "tags":
                run.tags(**event["values"])
            events.append(event)

        def start(level: int) -> None:
            all_arguments = [*arguments, "--work", str(work), "--memory-level", str(level)]
            child_process.run_command("tests.engine.capped", all_arguments, work, on_event, 120, 200, warm=True)

        try:
            retry_out_of_memory(start, tmp_path / "memory_level", run, warnings.append)
        finally:
            tags = MlflowClient(Settings().tracking_uri).get_run(run.run_id).data.tags
    return tags, events, warnings


def test_a_lid_on_memory_is_met_by_smaller_micro_batches_until_it_fits(base, tmp_path, monkeypatch):
    tags, events, warnings = descended(base, tmp_path, monkeypatch, cap=800)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    level = int((tmp_path / "memory_level").read_text())
    assert level >= 1 and report["details"]["batch"]["effective"] == 64
    assert report["details"]["batch"]["micro"] == 64 >> level
    assert tags["memory_fallback.1"] == "micro-batch 64 -> 32, accumulated to 64 as before"
    assert "allocate" in tags["out_of_memory.1"] and len(warnings) == level
    assert report["facts"]["steps"] == 3


def test_a_single_long_row_is_met_by_recompute(tmp_path, monkeypatch):
    """Eight layers keep 2 x 8192 float32 numbers of each of some 1000 tokens; made again, one layer at a time does."""
    deep = ModelDir(pico_model(tmp_path / "deep", hidden=32, layers=8, intermediate_size=8192))
    text = " ".join(f"Close audit {n} for the north hall." for n in range(40))
    long = [Row(messages=[Message(role="user", content=f"{n} {text}"), Message(role="assistant", content="{}")])
            for n in range(3)]  # fmt: skip
    (tmp_path / "long").mkdir()
    write_rows(tmp_path / "long" / "train.jsonl", long)
    single_row = dict(batch_size=1, micro_batch_size=1, max_steps=1)
    tags, events, warnings = descended(deep, tmp_path, monkeypatch, 400, tmp_path / "long", **single_row)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["steps"] == 1 and report["details"]["batch"] == {"effective": 1, "micro": 1}
    assert tags["memory_fallback.1"] == "recompute on" and "allocate" in tags["out_of_memory.1"] and len(warnings) == 1
    assert "memory_fallback.2" not in tags
