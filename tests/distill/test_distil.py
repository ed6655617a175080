import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.core.command import Report
from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row, read_rows, write_rows
from tasks.distill import DistillConfig
from tasks.distill.run import distil
from tasks.distill.states import StatesConfig
from tasks.distill.states.run import remember
from tasks.engine.load import load_model
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


@pytest.fixture(scope="module")
def states(tmp_path_factory, teacher, dataset):
    return kept(tmp_path_factory.mktemp("states"), teacher, dataset)


def kept(directory: Path, teacher: ModelDir, dataset: Path, known: Path | None = None, **settings) -> Path:
    remember(StatesConfig(**settings), teacher, dataset, directory, Job(directory / "work"), known)
    return directory


def run(student: ModelDir, teacher: ModelDir, dataset: Path, directory: Path, states=None, **settings) -> Report:
    out = directory / "out"
    out.mkdir(parents=True)
    config = DistillConfig(**(SETTINGS | settings))
    return distil(config, student, teacher, dataset, out, Job(directory / "work"), states=states)


def events(work: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (work / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def steps(work: Path) -> list[dict[str, float]]:
    return [e["values"] for e in events(work, "metrics") if "grad_norm" in e["values"]]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_student_comes_nearer_to_the_teacher_and_the_report_shows_both_parts(
    student, teacher, dataset, states, tmp_path, method
):
    report = run(student, teacher, dataset, tmp_path, states, method=method, learning_rate=1e-2, max_steps=30)
    told = steps(tmp_path / "work")
    assert {"kd_loss", "ce_loss", "loss", "kd_grad_norm", "ce_grad_norm", "learning_rate"} <= told[0].keys()
    share = 0.7 if method == "full" else 0.99  # an adapter cannot do much for a random base
    assert report.metrics["validation_kd_loss"] < share * told[0]["kd_loss"]
    assert report.metrics["validation_ce_loss"] < told[0]["ce_loss"]
    whole = 0.7 * report.metrics["train_kd_loss"] + 0.3 * report.metrics["train_ce_loss"]
    assert report.metrics["train_loss"] == pytest.approx(whole, rel=1e-4)
    assert 0 < report.metrics["teacher_validation_loss"] < report.metrics["validation_ce_loss"]
    written = ModelDir(tmp_path / "out") if method == "full" else ModelDir(student.base, tmp_path / "out")
    load_model(written, "float32", "cpu")
    assert (tmp_path / "out" / "report" / "loss.png").is_file()


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher, dataset, tmp_path):
    """Remembered states through the frozen head give the very distribution that the student computes."""
    base = ModelDir(teacher.base)
    report = run(base, base, dataset, tmp_path, max_steps=1, kd_weight=1, ce_weight=0)
    assert abs(report.metrics["train_kd_loss"]) < 1e-4
    assert report.metrics["teacher_train_loss"] > 0.05


def test_every_way_to_the_teacher_gives_the_same_student(student, teacher, dataset, states, tmp_path):
    """States given, states made by the way, the teacher beside the student: the same run. A top k is near it."""
    ways = {
        "given": {"states": states},
        "made": {},
        "online": {"teacher_online": True},
        "top": {"states_budget_gib": 0, "top_k": 200},
    }
    made = {name: run(student, teacher, dataset, tmp_path / name, max_steps=3, **way) for name, way in ways.items()}
    models = {name: load_file(tmp_path / name / "out" / "model.safetensors") for name in ways}
    assert all(torch.equal(value, models["made"][name]) for name, value in models["given"].items())
    for other, tolerance in (("online", 1e-5), ("top", 2e-2)):
        assert made[other].metrics["train_kd_loss"] == pytest.approx(
            made["given"].metrics["train_kd_loss"], rel=tolerance
        )
    assert not events(tmp_path / "given" / "work", "progress")[0]["unit"].startswith("rows through the teacher")


def test_states_of_an_older_format_are_of_no_help(teacher, dataset, states, tmp_path):
    older = shutil.copytree(states, tmp_path / "older")
    about = older / "states.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 1'))
    kept(tmp_path / "again", teacher, dataset, known=older)
    assert any("teacher" in e["unit"] for e in events(tmp_path / "again" / "work", "progress"))


def test_rows_that_the_states_lack_are_asked_of_the_teacher(student, teacher, dataset, states, tmp_path):
    more = example_dataset(tmp_path / "more", train=50)
    whole = kept(tmp_path / "whole", teacher, more)
    grown = kept(tmp_path / "grown", teacher, more, known=states)
    asked = [e["total"] for e in events(tmp_path / "grown" / "work", "progress") if "teacher" in e["unit"]]
    assert asked[-1] == 10  # 40 training rows were known, and of the 10 new ones with 10 validation rows ten are new
    read = [torch.from_file(str(d / "states.bin"), size=(d / "states.bin").stat().st_size // 4) for d in (whole, grown)]
    torch.testing.assert_close(*read, rtol=1e-4, atol=1e-4)
    assert run(student, teacher, more, tmp_path / "run", states, max_steps=1).metrics["train_loss"] > 0
    other = ModelDir(teacher.base)
    with pytest.raises(BadConfig, match="the states of another teacher"):
        run(student, other, dataset, tmp_path / "other", states)


def test_an_interrupted_teacher_pass_goes_on_and_gives_the_same_states(teacher, dataset, tmp_path, monkeypatch):
    from tasks.distill.states import teacher as module

    whole = kept(tmp_path / "whole", teacher, dataset, batch_tokens=256)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_MARKS", -1)
    answer, calls = module.answer, 0

    def count(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(module, "answer", count)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "stopped", teacher, dataset, batch_tokens=256)
    kept(tmp_path / "stopped", teacher, dataset, batch_tokens=256)
    batches = calls - 1
    for name in ("states.bin", "loss.bin", "said.bin", "index.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (whole / name).read_bytes()
    shutil.rmtree(tmp_path / "stopped" / "work")
    calls = 10
    kept(tmp_path / "stopped", teacher, dataset, batch_tokens=256)
    assert calls == 10 + batches  # three batches of the first try were not asked again


def test_a_teacher_that_is_wrong_is_shown_weighed_or_stopped(student, teacher, dataset, states, tmp_path):
    """The labels of rows 3 and 7 say what the teacher has never seen."""
    rows = list(read_rows(dataset / "train.jsonl"))
    for number in (3, 7):
        rows[number - 1] = Row(messages=[rows[number - 1].messages[0], Message(role="assistant", content="zz")])
    lying = tmp_path / "lying"
    shutil.copytree(dataset, lying)
    write_rows(lying / "train.jsonl", rows)
    plain = run(student, teacher, lying, tmp_path / "plain", states, max_steps=2)
    told = json.loads((tmp_path / "plain" / "out" / "report" / "teacher.json").read_text())["train"]
    assert {3, 7} <= {wrong["row"] for wrong in told["wrong"]}
    assert told["accuracy"] == pytest.approx(1 - len(told["wrong"]) / 40)
    page = (tmp_path / "plain" / "out" / "report" / "teacher.html").read_text()
    assert "<td>3<td>" in page and "<td>7<td>" in page
    left = run(student, teacher, lying, tmp_path / "left", states, max_steps=2, wrong_row_weight=0)
    assert left.facts["rows"] == 40 - len(told["wrong"])
    half = run(student, teacher, lying, tmp_path / "half", states, max_steps=2, wrong_row_weight=0.5)
    assert half.metrics["train_ce_loss"] < plain.metrics["train_ce_loss"]
    with pytest.raises(GateFailed, match=r"gets .*% of 10 validation rows right .*min_teacher_accuracy=100"):
        base = ModelDir(pico_model(tmp_path / "random", hidden=64, seed=5))
        run(student, base, dataset, tmp_path / "gate", min_teacher_accuracy=1)
    with pytest.raises(GateFailed, match="max_teacher_loss=0.0001"):
        run(student, teacher, dataset, tmp_path / "loss", states, max_teacher_loss=0.0001)


def test_balance_brings_the_weighted_gradients_into_the_ratio_of_the_weights(
    student, teacher, dataset, states, tmp_path
):
    run(student, teacher, dataset, tmp_path, states, balance=True, kd_weight=0.5, ce_weight=0.5, max_steps=40)
    told = steps(tmp_path / "work")
    kd, ce = (sum(step[name] for step in told[17:37]) for name in ("kd_grad_norm", "ce_grad_norm"))
    ratio = ce / kd
    last = told[38]  # its weights are those of the 20 steps before the last
    expected = (ratio * last["kd_loss"] + last["ce_loss"]) / (1 + ratio)
    assert last["loss"] == pytest.approx(expected, rel=1e-4)
    assert last["loss"] != pytest.approx(0.5 * last["kd_loss"] + 0.5 * last["ce_loss"], rel=1e-3)


def test_a_teacher_with_clipped_norms_is_another_teacher(teacher, dataset, states, tmp_path):
    clipped = kept(tmp_path / "clipped", teacher, dataset, known=states, clip_norms=0.5)
    exams = [json.loads((directory / "report" / "teacher.json").read_text()) for directory in (states, clipped)]
    assert exams[1]["validation"]["loss"] != exams[0]["validation"]["loss"]
    assert not any("were asked of this teacher before" in e["message"] for e in events(clipped / "work", "log"))


def test_rounds_on_the_students_own_answers_bring_it_nearer_to_the_teacher(student, teacher, dataset, states, tmp_path):
    settings = dict(learning_rate=5e-3, max_steps=12, on_policy_rounds=2, on_policy_share=1)
    report = run(student, teacher, dataset, tmp_path / "run", states, **settings)
    rounds = report.details["on_policy"]
    assert [one["rows"] for one in rounds] == [40, 40]
    assert all(one["kd_loss_after"] < one["kd_loss_before"] for one in rounds)
    own = json.loads((tmp_path / "run" / "work" / "answers-1.json").read_text())
    assert all(labels[-1] == ids[-1] and labels[0] == -100 for ids, labels in own)
    job = Job(tmp_path / "run" / "work")  # the same command again: everything is found, nothing is trained
    config = DistillConfig(**(SETTINGS | settings))
    again = distil(config, student, teacher, dataset, tmp_path / "run" / "out", job, states=states)
    assert again.details["on_policy"] == rounds


def test_a_fine_tuned_student_is_taught_on(student, teacher, dataset, states, tmp_path):
    first = run(student, teacher, dataset, tmp_path / "first", states, method="lora", max_steps=20, learning_rate=1e-2)
    start = ModelDir(student.base, tmp_path / "first" / "out")
    for method in ("full", "lora"):
        then = run(start, teacher, dataset, tmp_path / method, states, method=method, max_steps=1, learning_rate=1e-9)
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
    for name, settings in {"whole": {}, "top": {"states_budget_gib": 0, "top_k": 32}}.items():
        report = run(student, padded, dataset, tmp_path / name, max_steps=2, **settings)
        assert report.metrics["train_kd_loss"] > 0


def test_a_top_k_reads_only_the_temperatures_it_was_made_for(student, teacher, dataset, tmp_path):
    top = kept(tmp_path / "top", teacher, dataset, states_budget_gib=0, top_k=8)
    logs = [event["message"] for event in events(top / "work", "log")]
    assert any("GiB, more than states_budget_gib=0" in text for text in logs)
    assert any("of the mass is the tail's, KL" in text for text in logs)
    with pytest.raises(BadConfig, match="temperature=1.7: with the top k kept, it must be one of 1, 1.5, 2"):
        run(student, teacher, dataset, tmp_path / "run", top, temperature=1.7)


def test_the_same_inputs_give_the_same_student(student, teacher, dataset, tmp_path):
    for name in ("a", "b"):
        run(student, teacher, dataset, tmp_path / name)
    models = [load_file(tmp_path / name / "out" / "model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_two_processes_make_the_student_of_one(teacher, student, dataset, tmp_path):
    """Process 0 asks the teacher, both learn from what it wrote; the weights are one process's."""
    settings = dict(batch_size=8, micro_batch_size=4, max_steps=4, learning_rate=5e-3, precision="float32")
    (tmp_path / "config.json").write_text(json.dumps(settings | {"processes": 2}))
    options = dict(student=student.base, teacher=f"{teacher.base}+{teacher.adapter}", dataset=dataset,
                   out=tmp_path / "two", work=tmp_path / "two.work")  # fmt: skip
    command = [sys.executable, "-m", "tasks.core.launch", "2", "tasks.distill.run", tmp_path / "config.json"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [str(part) for part in command], cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = run(student, teacher, dataset, tmp_path / "one", **settings)
    told = json.loads((tmp_path / "two" / "report.json").read_text())["metrics"]
    assert told["train_loss"] == pytest.approx(report.metrics["train_loss"], rel=1e-4)
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "two", tmp_path / "one" / "out"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.float(), rtol=2e-2, atol=1e-4)
