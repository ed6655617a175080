"""Two processes train as one does: same losses, same weights, checkpoints that either goes on from. CPU, gloo."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.core import child_process
from tasks.core.errors import BadConfig, GateFailed, Preempted, StageError
from tasks.core.refs import ModelDir
from tasks.engine.data.dataset import encode_file
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.training.acceleration import training_batches
from tasks.engine.training.train import train
from tasks.teacher import FineTuneConfig
from tests.engine.distributed.two_processes import PRECISION, RUNS, SETTINGS
from tests.engine.rows import example_dataset
from tests.engine.training.test_loop import assert_equal, sigterm, training_spec, weights  # noqa: F401
from tests.pico import pico_model

CLOSE = dict(rtol=2e-3, atol=2e-5)  # sums over rows in another order


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """One process's runs, one of them stopped in step 3, and then what two processes made of the same."""
    dataset, work = example_dataset(tmp_path_factory.mktemp("dataset")), tmp_path_factory.mktemp("work")
    rows = encode_file(load_tokenizer(base), dataset / "train.jsonl", 256, warn=pytest.fail)
    single = {}

    def stop(call: int) -> None:
        if call == 9:  # four micro-batches a step: in step 3
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    for run, (_, method) in RUNS.items():
        single[run] = train(training_spec(base, rows, work / f"{run}-alone", method=method, **SETTINGS))
        with pytest.raises(Preempted):
            train(training_spec(base, rows, work / f"{run}-one", method=method, at_micro_batch=stop, **SETTINGS))
    signal.signal(signal.SIGTERM, before)
    arguments = [str(base.base), str(dataset), str(work)]
    child_process.run_command(
        "tests.engine.distributed.two_processes", arguments, work / "two", print, 200, 300, warm=True
    )
    return rows, work, single


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kind", ["", "-resumed"])
def test_two_processes_take_the_steps_of_one(runs, run, kind):
    _, work, single = runs
    model, history = single[run]
    two_ranks = json.loads((work / f"{run}{kind}.json").read_text())
    assert two_ranks["loss"] == pytest.approx(history.steps["loss"], rel=1e-4)
    assert two_ranks["grad_norm"] == pytest.approx(history.steps["grad_norm"], rel=1e-3)
    assert_equal(load_file(work / f"{run}{kind}.safetensors"), weights(model), **CLOSE)


@pytest.mark.parametrize("run", RUNS)
def test_one_process_goes_on_from_the_checkpoint_of_two(runs, base, run):
    rows, work, single = runs
    model, history = single[run]
    stopped = training_spec(base, rows, work / f"{run}-stopped", method=RUNS[run][1], **SETTINGS)
    assert sorted(path.name for path in stopped.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    resumed, resumed_history = train(stopped)
    assert resumed_history.steps["loss"] == pytest.approx(history.steps["loss"], rel=1e-4)
    assert_equal(weights(resumed), weights(model), **CLOSE)


@pytest.mark.parametrize("run", RUNS)
def test_gradients_in_one_buffer_are_those_of_one_process(runs, base, run):
    rows, work, single = runs
    two_ranks = load_file(work / f"{run}-gradients.safetensors")
    norm, half = float(two_ranks.pop("norm")), PRECISION[run] == "bfloat16"
    assert norm == pytest.approx(single[run][1].steps["grad_norm"][0], rel=1e-2 if half else 1e-3)
    settings = SETTINGS | {"precision": PRECISION[run]}
    spec = training_spec(base, rows, work / f"{run}-spec-gradients", method=RUNS[run][1], **settings)
    model = spec.build()
    batches = training_batches(spec, model)
    for batch in (batches[number] for number in range(4)):
        spec.loss_sums(model, batch).loss.backward()
    labels = sum(len(batches[number]["labels"]) for number in range(4))
    scale = 0.1 / norm / labels
    expected = {name: p.grad * scale for name, p in model.named_parameters() if p.requires_grad}
    assert_equal(two_ranks, expected, **(dict(rtol=3e-2, atol=5e-4) if half else CLOSE))


def test_the_command_in_two_processes_writes_one_output_and_one_goes_on_from_its_checkpoint(base, tmp_path):
    """On GPUs where there are two: with NCCL's work in CUDA graphs, which must not keep the processes from ending."""
    dataset, events = example_dataset(tmp_path / "dataset"), []
    settings = dict(rank=4, dropout=0, batch_size=8, micro_batch_size=4, max_steps=6, save_every_steps=4)

    def run(count: int, out: Path) -> list[float]:
        config = FineTuneConfig(**settings, processes=count, strategy="fsdp2")
        (tmp_path / "config.json").write_text(config.model_dump_json())
        arguments = [str(tmp_path / "config.json"), "--base", str(base.base), "--dataset", str(dataset)]
        arguments += ["--out", str(out), "--work", str(tmp_path / "work")]
        events.clear()
        child_process.run_command(
            "tasks.teacher.run", arguments, tmp_path / "work", events.append, 120, 240, processes=count
        )
        metrics = [event["values"] for event in events if event["event"] == "metrics"]
        return [values["loss"] for values in metrics if "loss" in values]

    two_ranks = run(2, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["steps"] == 6 and report["details"]["batch"] == {"effective": 8, "micro": 4}
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "checkpoint-6")
    resumed_losses = run(1, tmp_path / "alone")
    assert any("resumes from checkpoint-4 of 6 steps" in event.get("message", "") for event in events)
    assert len(two_ranks) == 6 and resumed_losses == pytest.approx(
        two_ranks[4:], rel=2e-2 if torch.cuda.is_available() else 1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_processes_than_gpus_are_refused(base, tmp_path):
    processes = torch.cuda.device_count() + 1
    config = FineTuneConfig(processes=processes, batch_size=8 * processes)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    arguments = [str(tmp_path / "config.json"), "--base", str(base.base), "--out", str(tmp_path / "out")]
    arguments += ["--dataset", str(example_dataset(tmp_path / "dataset")), "--work", str(tmp_path / "work")]
    with pytest.raises(BadConfig, match="set processes to the number of GPUs"):
        child_process.run_command(
            "tasks.teacher.run", arguments, tmp_path / "work", print, 120, 240, processes=config.processes
        )


@pytest.mark.parametrize(
    "act, kind, message",
    [("gate", GateFailed, "exact match 0.81 is below 0.90"), ("crash", StageError, r"nobody foresaw this\Z")],
)
def test_what_went_wrong_in_two_processes_is_told_as_it_is_of_one(tmp_path, act, kind, message):
    (tmp_path / "config.json").write_text(json.dumps({"act": act}))
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    with pytest.raises(kind, match=message):
        child_process.run_command("tests.core.probe", arguments, tmp_path / "work", print, 120, 240, processes=2)
