import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.command import Report
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.run import distil
from tasks.distill.states import teacher_loss, teacher_states
from tasks.engine.batches import encode_file
from tasks.engine.load import load_model, load_tokenizer
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.engine.rows import example_dataset
from tests.pico import pico_model

SETTINGS = dict(rank=4, learning_rate=5e-3, batch_size=8, micro_batch_size=8, max_steps=12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return example_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, dataset):
    """A base that has learnt how answers look, and an adapter that has learnt a little more."""
    random, base, adapter = (tmp_path_factory.mktemp(name) for name in ("random", "base", "adapter"))
    settings = dict(rank=8, learning_rate=5e-3, batch_size=8, micro_batch_size=8)
    for method, steps, start, out in [("full", 60, pico_model(random, hidden=64), base), ("lora", 5, base, adapter)]:
        config = FineTuneConfig(method=method, max_steps=steps, **settings)
        fine_tune(config, ModelDir(start), dataset, out, Job(tmp_path_factory.mktemp("work")))
    return ModelDir(base, adapter)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("student"), hidden=32, seed=1))


def run(student: ModelDir, teacher: ModelDir, dataset: Path, directory: Path, **settings) -> Report:
    out = directory / "out"
    out.mkdir(parents=True)
    config = DistillConfig(**(SETTINGS | settings))
    return distil(config, student, teacher, dataset, out, Job(directory / "work"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_student_comes_nearer_to_the_teacher_and_the_report_shows_both_parts(
    student, teacher, dataset, tmp_path, method
):
    report = run(student, teacher, dataset, tmp_path, method=method, learning_rate=1e-2, max_steps=30)
    lines = map(json.loads, (tmp_path / "work" / "events.jsonl").read_text().splitlines())
    steps = [e["values"] for e in lines if e["event"] == "metrics" and "grad_norm" in e["values"]]
    assert {"kd_loss", "ce_loss", "loss", "tokens_per_second", "learning_rate"} <= steps[0].keys()
    share = 0.7 if method == "full" else 0.99  # an adapter cannot do much for a random base
    assert report.metrics["validation_kd_loss"] < share * steps[0]["kd_loss"]
    assert report.metrics["validation_ce_loss"] < steps[0]["ce_loss"]
    whole = 0.7 * report.metrics["train_kd_loss"] + 0.3 * report.metrics["train_ce_loss"]
    assert report.metrics["train_loss"] == pytest.approx(whole, rel=1e-4)
    assert 0 < report.metrics["teacher_validation_loss"] < report.metrics["validation_ce_loss"]
    written = ModelDir(tmp_path / "out") if method == "full" else ModelDir(student.base, tmp_path / "out")
    load_model(written, "float32", "cpu")
    assert (tmp_path / "out" / "report" / "loss.png").is_file()


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher, dataset, tmp_path):
    """Cached states through the frozen head give the very distribution that the student computes."""
    base = ModelDir(teacher.base)
    report = run(base, base, dataset, tmp_path, max_steps=1, kd_weight=1, ce_weight=0)
    assert abs(report.metrics["train_kd_loss"]) < 1e-4
    assert report.metrics["teacher_train_loss"] > 0.05


def test_different_tokenizers_are_refused_with_the_first_difference(student, teacher, dataset, tmp_path):
    other = shutil.copytree(student.base, tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (next(token for token, index in vocabulary.items() if index == i) for i in (300, 301))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(BadConfig, match="token 300 is .* in the teacher's and .* in the student's.*family"):
        run(ModelDir(other), teacher, dataset, tmp_path / "run")


def test_a_padded_teacher_vocabulary_is_cut(student, dataset, tmp_path):
    padded = ModelDir(pico_model(tmp_path / "padded", hidden=64, vocab_size=448))
    report = run(student, padded, dataset, tmp_path, max_steps=2)
    assert report.metrics["train_kd_loss"] > 0


def test_an_interrupted_teacher_pass_goes_on_and_gives_the_same_states(teacher, dataset, tmp_path, monkeypatch):
    model = load_model(teacher, "float32", "cpu")
    rows = encode_file(load_tokenizer(teacher), dataset / "train.jsonl", 256, pytest.fail)
    whole = teacher_states(model, rows, 8, torch.float32, "run", Job(tmp_path / "whole"))
    assert teacher_loss(whole, rows, 0, 1 << 20) > 0
    monkeypatch.setattr("tasks.distill.states.SECONDS_BETWEEN_MARKS", -1)
    calls = 0

    def count(module, *_):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = model.get_base_model().model.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        teacher_states(model, rows, 8, torch.float32, "run", Job(tmp_path / "stopped"))
    again = teacher_states(model, rows, 8, torch.float32, "run", Job(tmp_path / "stopped"))
    assert calls == 6  # 5 batches and the one that was stopped
    assert torch.equal(again.states, whole.states)
    calls = 10
    teacher_states(model, rows, 8, torch.float32, "other teacher", Job(tmp_path / "stopped"))
    assert calls == 15  # another run's states are not taken
    hook.remove()


def test_the_same_inputs_give_the_same_student(student, teacher, dataset, tmp_path):
    for name in ("a", "b"):
        run(student, teacher, dataset, tmp_path / name)
    models = [load_file(tmp_path / name / "out" / "model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
