"""Distillation by every divergence and from a cached or live teacher; the report has both parts of the loss."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.run import distil
from tasks.engine.models.load import load_model
from tests.distill.runs import SETTINGS, events, run, steps
from tests.pico import pico_model


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_student_approaches_the_teacher_and_the_report_has_both_parts(
    student, teacher, dataset, cache, tmp_path, method
):
    report = run(student, teacher, dataset, tmp_path, cache, method=method, learning_rate=1e-2, max_steps=30)
    metrics = steps(tmp_path / "work")
    assert {"kd_loss", "ce_loss", "loss", "kd_grad_norm", "ce_grad_norm", "learning_rate"} <= metrics[0].keys()
    share = 0.7 if method == "full" else 0.99  # an adapter cannot do much for a random base
    assert report.metrics["validation_kd_loss"] < share * metrics[0]["kd_loss"]
    assert report.metrics["validation_ce_loss"] < metrics[0]["ce_loss"]
    expected = 0.7 * report.metrics["train_kd_loss"] + 0.3 * report.metrics["train_ce_loss"]
    assert report.metrics["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert 0 < report.metrics["teacher_validation_loss"] < report.metrics["validation_ce_loss"]
    written = ModelDir(tmp_path / "out") if method == "full" else ModelDir(student.base, tmp_path / "out")
    load_model(written, "float32", "cpu")
    assert (tmp_path / "out" / "report" / "loss.png").is_file()


def test_a_student_that_is_its_teacher_has_no_divergence(teacher, dataset, tmp_path):
    """Cached hidden states through the frozen head give the very distribution that the student computes."""
    base = ModelDir(teacher.base)
    report = run(base, base, dataset, tmp_path, max_steps=1, kd_weight=1, ce_weight=0)
    assert abs(report.metrics["train_kd_loss"]) < 1e-4
    assert report.metrics["teacher_train_loss"] > 0.05


def test_cached_and_live_teachers_give_the_same_student(student, teacher, dataset, cache, tmp_path):
    """A cache as input, one written by the run, the teacher in memory: the same run. A top k is near it."""
    sources = {
        "input": {"cache": cache},
        "written": {},
        "online": {"teacher_online": True},
        "top": {"states_budget_gib": 0, "top_k": 200},
    }
    reports = {
        name: run(student, teacher, dataset, tmp_path / name, max_steps=3, **source) for name, source in sources.items()
    }
    models = {name: load_file(tmp_path / name / "out" / "model.safetensors") for name in sources}
    assert all(torch.equal(value, models["written"][name]) for name, value in models["input"].items())
    for other, tolerance in (("online", 1e-5), ("top", 2e-2)):
        assert reports[other].metrics["train_kd_loss"] == pytest.approx(
            reports["input"].metrics["train_kd_loss"], rel=tolerance
        )
    assert not events(tmp_path / "input" / "work", "progress")[0]["unit"].startswith("rows through the teacher")


def test_balance_keeps_the_ratio_of_the_weighted_gradients(student, teacher, dataset, cache, tmp_path):
    run(student, teacher, dataset, tmp_path, cache, balance=True, kd_weight=0.5, ce_weight=0.5, max_steps=40)
    metrics = steps(tmp_path / "work")
    kd, ce = (sum(step[name] for step in metrics[17:37]) for name in ("kd_grad_norm", "ce_grad_norm"))
    ratio = ce / kd
    last = metrics[38]  # its weights are those of the 20 steps before the last
    expected = (ratio * last["kd_loss"] + last["ce_loss"]) / (1 + ratio)
    assert last["loss"] == pytest.approx(expected, rel=1e-4)
    assert last["loss"] != pytest.approx(0.5 * last["kd_loss"] + 0.5 * last["ce_loss"], rel=1e-3)


def test_on_policy_rounds_bring_the_student_nearer_to_the_teacher(student, teacher, dataset, cache, tmp_path):
    settings = dict(learning_rate=5e-3, max_steps=12, on_policy_rounds=2, on_policy_share=1)
    report = run(student, teacher, dataset, tmp_path / "run", cache, **settings)
    rounds = report.details["on_policy"]
    assert [result["rows"] for result in rounds] == [40, 40]
    assert all(result["kd_loss_after"] < result["kd_loss_before"] for result in rounds)
    answers = json.loads((tmp_path / "run" / "work" / "answers-1.json").read_text())
    assert all(labels[-1] == ids[-1] and labels[0] == -100 for ids, labels in answers)
    job = Job(tmp_path / "run" / "work")  # the same command again: nothing is trained
    config = DistillConfig(**(SETTINGS | settings))
    repeated = distil(config, student, teacher, dataset, tmp_path / "run" / "out", job, teacher_cache=cache)
    assert repeated.details["on_policy"] == rounds


def test_a_fine_tuned_student_is_distilled_further(student, teacher, dataset, cache, tmp_path):
    first = run(student, teacher, dataset, tmp_path / "first", cache, method="lora", max_steps=20, learning_rate=1e-2)
    start = ModelDir(student.base, tmp_path / "first" / "out")
    for method in ("full", "lora"):
        then = run(start, teacher, dataset, tmp_path / method, cache, method=method, max_steps=1, learning_rate=1e-9)
        assert then.metrics["validation_loss"] == pytest.approx(first.metrics["validation_loss"], rel=0.02)


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
    for name, settings in {"exact": {}, "top": {"states_budget_gib": 0, "top_k": 32}}.items():
        report = run(student, padded, dataset, tmp_path / name, max_steps=2, **settings)
        assert report.metrics["train_kd_loss"] > 0


def test_the_same_inputs_give_the_same_student(student, teacher, dataset, tmp_path):
    for name in ("a", "b"):
        run(student, teacher, dataset, tmp_path / name)
    models = [load_file(tmp_path / name / "out" / "model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_two_processes_train_the_student_of_one(teacher, student, dataset, tmp_path):
    """Process 0 runs the teacher, both train from its cache; the weights are those of one process."""
    settings = dict(batch_size=8, micro_batch_size=4, max_steps=4, learning_rate=5e-3, precision="float32")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"processes": 2}))
    options = dict(student=student.base, teacher=f"{teacher.base}+{teacher.adapter}", dataset=dataset,
                   out=tmp_path / "two", work=tmp_path / "two.work")  # fmt: skip
    command = [sys.executable, "-m", "tasks.core.launch", "2", "tasks.distill.run", tmp_path / "config.json"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    process = subprocess.run(
        [str(part) for part in command], cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    report = run(student, teacher, dataset, tmp_path / "one", **settings)
    metrics = json.loads((tmp_path / "two" / "report.json").read_text())["metrics"]
    assert metrics["train_loss"] == pytest.approx(report.metrics["train_loss"], rel=1e-4)
    sharded, single = (load_file(out / "model.safetensors") for out in (tmp_path / "two", tmp_path / "one" / "out"))
    for name, value in single.items():
        torch.testing.assert_close(sharded[name].float(), value.float(), rtol=2e-2, atol=1e-4)
