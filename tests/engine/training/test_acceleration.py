"""Training without tasks.engine.speed: slower, the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.engine.rows import example_dataset
from tests.pico import pico_model

SETTINGS = dict(rank=4, learning_rate=5e-3, batch_size=8, micro_batch_size=4, max_steps=6)
WITHOUT_SPEED = """
import sys
sys.modules["tasks.engine.speed"] = None  # its import raises ModuleNotFoundError
from tasks.core.command import command
from tasks.teacher.run import fine_tune
command(fine_tune)
"""


def losses(work: Path) -> list[float]:
    events = map(json.loads, (work / "events.jsonl").read_text().splitlines())
    return [event["values"]["loss"] for event in events if "grad_norm" in event.get("values", {})]


@pytest.mark.parametrize(
    "settings", [dict(method="lora"), dict(method="full"), dict(method="full", gradient_checkpointing=True)]
)
def test_a_run_trains_to_the_same_losses_without_the_speed_package(tmp_path, settings):
    base, dataset = pico_model(tmp_path / "base", hidden=32), example_dataset(tmp_path / "dataset")
    config = FineTuneConfig(**SETTINGS, **settings)
    (tmp_path / "fast").mkdir()
    fine_tune(config, ModelDir(base), dataset, tmp_path / "fast", Job(tmp_path / "fast-work"))
    (tmp_path / "config.json").write_text(config.model_dump_json())
    arguments = [tmp_path / "config.json", "--base", base, "--dataset", dataset, "--out", tmp_path / "plain"]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_SPEED, *map(str, arguments), "--work", str(tmp_path / "plain-work")],
        cwd=Path(__file__).parents[3], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert losses(tmp_path / "plain-work") == pytest.approx(losses(tmp_path / "fast-work"), rel=1e-4)
    assert (
        "tasks.engine.speed is not installed. Rows are padded instead"
        in (tmp_path / "plain-work" / "events.jsonl").read_text()
    )
