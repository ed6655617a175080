"""Two processes train as one does: same losses, same weights, checkpoints that either goes on from. CPU, gloo."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file

from tasks.core import child
from tasks.core.errors import GateFailed, Preempted
from tasks.core.refs import ModelDir
from tasks.engine.batches import encode_file
from tasks.engine.load import load_tokenizer
from tasks.engine.trainer import train
from tasks.teacher import FineTuneConfig
from tests.engine.rows import example_dataset
from tests.engine.test_trainer import assert_equal, plan, sigterm, weights  # noqa: F401
from tests.engine.two import RUNS, SETTINGS
from tests.pico import pico_model

CLOSE = dict(rtol=2e-3, atol=2e-5)  # sums over rows in another order


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One process's runs, one of them stopped in step 3, and then what two processes made of the same."""
    base = ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))
    dataset, work = example_dataset(tmp_path_factory.mktemp("dataset")), tmp_path_factory.mktemp("work")
    rows = encode_file(load_tokenizer(base), dataset / "train.jsonl", 256, warn=pytest.fail)
    whole = {}

    def stop(call: int) -> None:
        if call == 9:  # four micro-batches a step: in step 3
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    for run, (_, method) in RUNS.items():
        whole[run] = train(plan(base, rows, work / f"{run}-alone", method=method, **SETTINGS))
        with pytest.raises(Preempted):
            train(plan(base, rows, work / f"{run}-one", method=method, at_micro_batch=stop, **SETTINGS))
    signal.signal(signal.SIGTERM, before)
    arguments = [str(base.base), str(dataset), str(work)]
    child.run_command("tests.engine.two", arguments, work / "two", print, 200, 300, warm=True)
    return base, rows, work, whole


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["", "-resumed"])
def test_two_processes_take_the_steps_of_one(ran, run, kind):
    _, _, work, whole = ran
    model, history = whole[run]
    theirs = json.loads((work / f"{run}{kind}.json").read_text())
    assert theirs["loss"] == pytest.approx(history.steps["loss"], rel=1e-4)
    assert theirs["grad_norm"] == pytest.approx(history.steps["grad_norm"], rel=1e-3)
    assert_equal(load_file(work / f"{run}{kind}.safetensors"), weights(model), **CLOSE)


@pytest.mark.parametrize("run", RUNS)
def test_one_process_goes_on_from_the_checkpoint_of_two(ran, run):
    base, rows, work, whole = ran
    model, history = whole[run]
    stopped = plan(base, rows, work / f"{run}-stopped", method=RUNS[run][1], **SETTINGS)
    assert sorted(path.name for path in stopped.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    resumed, later = train(stopped)
    assert later.steps["loss"] == pytest.approx(history.steps["loss"], rel=1e-4)
    assert_equal(weights(resumed), weights(model), **CLOSE)


def test_the_command_in_two_processes_writes_one_output(ran, tmp_path):
    base, _, work, _ = ran
    dataset = example_dataset(tmp_path / "dataset")
    config = FineTuneConfig(rank=4, batch_size=8, micro_batch_size=4, max_steps=2, processes=2)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    arguments = [str(tmp_path / "config.json"), "--base", str(base.base), "--dataset", str(dataset)]
    arguments += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    events = []
    child.run_command("tasks.teacher.run", arguments, tmp_path / "work", events.append, 120, 240, processes=2)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["steps"] == 2 and report["details"]["batch"] == {"effective": 8, "micro": 4}
    assert [event["step"] for event in events if event["event"] == "metrics"] == [1, 2, 2]


def test_what_went_wrong_in_one_of_two_processes_is_told_as_it_is_of_one(tmp_path):
    (tmp_path / "config.json").write_text('{"act": "gate"}')
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(GateFailed, match="exact match 0.81 is below 0.90"):
        child.run_command("tests.core.probe", arguments, tmp_path / "work", print, 120, 240, processes=2)
