import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.child_process import FORK_SERVER
from tasks.core.command import Report
from tasks.core.errors import BadConfig, BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.models.load import load_model
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.engine.rows import example_dataset, example_rows
from tests.pico import pico_model
from tests.rows import write_rows
from tests.waiting import wait_until

SETTINGS = dict(rank=4, learning_rate=5e-3, batch_size=8, micro_batch_size=8, max_steps=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return example_dataset(tmp_path_factory.mktemp("dataset"))


def run(base: ModelDir, dataset: Path, directory: Path, **settings) -> Report:
    out = directory / "out"
    out.mkdir(parents=True)
    return fine_tune(FineTuneConfig(**(SETTINGS | settings)), base, dataset, out, Job(directory / "work"))


def events(directory: Path, kind: str) -> list[dict]:
    lines = (directory / "work" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "out").rglob("*")) if path.is_file()}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_loss_falls_and_the_same_inputs_give_the_same_files(base, dataset, tmp_path, method):
    report = run(base, dataset, tmp_path / "a", method=method, validate_every_steps=5)
    assert report.metrics["validation_loss"] < 5.8  # guessing costs ln(401) = 6.0
    assert report.facts["steps"] == 12 and report.facts["rows"] == 40
    assert 0 < report.facts["trainable_parameters"] <= report.facts["parameters"]
    assert (tmp_path / "a" / "out" / "report" / "loss.png").stat().st_size > 5000
    last = [event for event in events(tmp_path / "a", "metrics") if "grad_norm" in event["values"]][-1]
    assert last["step"] == 12
    assert last["values"].keys() == {"loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_gib"}
    progress = [event for event in events(tmp_path / "a", "progress") if event["unit"] == "steps"][-1]
    assert (progress["done"], progress["total"]) == (12, 12)
    assert re.fullmatch(r"loss \d\.\d+, [\d,]+ tokens/s, peak \d+\.\d GiB, 0:00 left", progress["note"])
    assert [e["step"] for e in events(tmp_path / "a", "metrics") if "validation_loss" in e["values"]] == [5, 10, 12]
    run(base, dataset, tmp_path / "b", method=method, validate_every_steps=5)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    out = tmp_path / "a" / "out"
    load_model(ModelDir(out) if method == "full" else ModelDir(base.base, out), "float32", "cpu")


def test_rows_over_max_length_are_left_out_and_named(base, dataset, tmp_path):
    long = Row(messages=[Message(role="user", content="valve " * 200), Message(role="assistant", content="{}")])
    tmp_path.joinpath("mixed").mkdir()
    write_rows(tmp_path / "mixed" / "train.jsonl", [*example_rows(9), long])
    report = run(base, tmp_path / "mixed", tmp_path, max_length=128, max_steps=1)
    assert report.facts["rows"] == 9 and "validation_loss" not in report.metrics
    assert "1 rows are longer than max_length=128 and left out: 10 (" in report.warnings[0]
    with pytest.raises(BadData, match="no row to train on"):
        run(base, dataset, tmp_path / "none", max_length=16)


def test_what_is_no_model_or_no_dataset_is_named(base, dataset, tmp_path):
    with pytest.raises(BadConfig, match="tokenizer_config.json"):
        run(ModelDir(dataset), dataset, tmp_path / "a")
    with pytest.raises(BadData, match="train.jsonl is not there"):
        run(base, base.base, tmp_path / "b")


def test_kill_9_in_the_middle_then_the_same_command_gives_the_same_adapter(base, dataset, tmp_path):
    settings = dict(max_steps=40, save_every_steps=5, dropout=0.05)
    uninterrupted = run(base, dataset, tmp_path / "whole", **settings)
    config = tmp_path / "config.json"
    config.write_text(FineTuneConfig(**(SETTINGS | settings)).model_dump_json())
    out, work = tmp_path / "killed" / "out", tmp_path / "killed" / "work"
    arguments = [config, "--base", base.base, "--dataset", dataset, "--out", out, "--work", work]
    child = FORK_SERVER.start("tasks.teacher.run", [*map(str, arguments)], tmp_path / "log.txt", dict(os.environ))
    wait_until(lambda: list(work.glob("checkpoints/checkpoint-*/manifest.json")), 120, 0.01)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: child.poll() is not None)
    assert child.returncode == -signal.SIGKILL
    assert not (out / "report.json").exists() and not (out / "adapter_model.safetensors").exists()
    out.rename(tmp_path / "killed" / "left")
    report = run(base, dataset, tmp_path / "killed", **settings)
    assert any("resumes from checkpoint-" in event["message"] for event in events(tmp_path / "killed", "log"))
    assert report.metrics["train_loss"] == pytest.approx(uninterrupted.metrics["train_loss"], rel=1e-3)
    adapters = [load_file(tmp_path / kind / "out" / "adapter_model.safetensors") for kind in ("whole", "killed")]
    for name, value in adapters[0].items():
        assert (value - adapters[1][name]).abs().max() < 1e-3, name


def test_memory_fallback_levels_are_tagged_and_one_that_makes_another_model_begins_anew(base, dataset, tmp_path):
    settings = dict(batch_size=8, micro_batch_size=4, use_dora=True, max_length=512, max_steps=3, save_every_steps=1)

    def descend(level: int, model=base, **more) -> list[str]:
        """Log of a run at a memory fallback level."""
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        before = len(events(tmp_path, "log")) if (tmp_path / "work").exists() else 0
        config = FineTuneConfig(**(SETTINGS | settings | {"allow_quality_loss": True} | more))
        fine_tune(config, model, dataset, tmp_path / "out", Job(tmp_path / "work", memory_level=level))
        return [event["message"] for event in events(tmp_path, "log")[before:]]

    third = "memory fallback level 3 after out-of-memory errors: recompute on; resumes from the last checkpoint"
    assert third in descend(3)
    assert "resumes from checkpoint-3 of 3 steps" in descend(4)  # the paged optimizer
    last = descend(8)
    assert (
        "memory fallback level 8 after out-of-memory errors: adapters on q_proj and v_proj only; another model: "
        "begins anew" in last
    )
    assert not any("resumes from checkpoint" in text for text in last)
    adapter_config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter_config["r"], adapter_config["use_dora"], adapter_config["target_modules"]) == (
        2,
        False,
        ["q_proj", "v_proj"],
    )
    tags = {name: text for event in events(tmp_path, "tags") for name, text in event["values"].items()}
    assert [tags[f"memory_fallback.{number}"] for number in range(1, 9)] == [
        "micro-batch 4 -> 2, accumulated to 8 as before", "micro-batch 2 -> 1, accumulated to 8 as before",
        "recompute on", "optimizer adamw -> paged_adamw_8bit", "max_length 512 -> 256, longer rows left out",
        "rank 4 -> 2", "DoRA off", "adapters on q_proj and v_proj only",
    ]  # fmt: skip
    earlier_adapter = ModelDir(base.base, (tmp_path / "out").rename(tmp_path / "earlier"))
    with pytest.raises(BadConfig, match="last of 4 memory fallback levels.*allow_quality_loss=true"):
        descend(5, allow_quality_loss=False)
    descend(5, earlier_adapter)
    with pytest.raises(BadConfig, match="level 5 nothing is left .*: an earlier adapter keeps its rank and"):
        descend(6, earlier_adapter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_s_peak_and_the_share_of_its_arithmetic_are_told(base, dataset, tmp_path):
    run(base, dataset, tmp_path)
    last = [event for event in events(tmp_path, "metrics") if "grad_norm" in event["values"]][-1]["values"]
    assert 0 < last["mfu"] < 1 and 0 < last["peak_gib"] < 10
    note = [event for event in events(tmp_path, "progress") if event["unit"] == "steps"][-1]["note"]
    assert re.search(r"tokens/s, peak \d+\.\d GiB, MFU \d+%, 0:00 left", note)
