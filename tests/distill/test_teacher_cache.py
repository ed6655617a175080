"""The teacher cache: reused, extended, resumed after an interruption; the teacher's accuracy on its rows."""

import json
import shutil

import pytest
import torch

from tasks.core.errors import BadConfig, GateFailed
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row, read_rows
from tests.distill.runs import cached, events, run
from tests.engine.rows import example_dataset
from tests.pico import pico_model
from tests.rows import write_rows


def test_a_cache_of_an_older_format_is_not_reused(teacher, dataset, cache, tmp_path):
    older = shutil.copytree(cache, tmp_path / "older")
    about = older / "states.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 1'))
    cached(tmp_path / "again", teacher, dataset, previous=older)
    assert any("teacher" in e["unit"] for e in events(tmp_path / "again" / "work", "progress"))


def test_rows_that_a_cache_lacks_go_through_the_teacher(student, teacher, dataset, cache, tmp_path):
    larger = example_dataset(tmp_path / "larger", train=50)
    complete = cached(tmp_path / "complete", teacher, larger)
    extended = cached(tmp_path / "extended", teacher, larger, previous=cache)
    totals = [e["total"] for e in events(tmp_path / "extended" / "work", "progress") if "teacher" in e["unit"]]
    assert totals[-1] == 10  # 40 training rows are cached, and of the 10 new ones with 10 validation rows ten are new
    files = [directory / "states.bin" for directory in (complete, extended)]
    states = [torch.from_file(str(file), size=file.stat().st_size // 4) for file in files]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    assert run(student, teacher, larger, tmp_path / "run", cache, max_steps=1).metrics["train_loss"] > 0
    other = ModelDir(teacher.base)
    with pytest.raises(BadConfig, match="the cache of another teacher"):
        run(student, other, dataset, tmp_path / "other", cache)


def test_an_interrupted_teacher_pass_resumes_and_gives_the_same_cache(teacher, dataset, tmp_path, monkeypatch):
    from tasks.distill.teacher_cache import progress_marker
    from tasks.distill.teacher_cache import teacher_pass as module

    complete = cached(tmp_path / "complete", teacher, dataset, batch_tokens=256)
    monkeypatch.setattr(progress_marker, "SECONDS_BETWEEN_MARKS", -1)
    teacher_outputs, calls = module.teacher_outputs, 0

    def count(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return teacher_outputs(*arguments)

    monkeypatch.setattr(module, "teacher_outputs", count)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "stopped", teacher, dataset, batch_tokens=256)
    cached(tmp_path / "stopped", teacher, dataset, batch_tokens=256)
    batches = calls - 1
    for name in ("states.bin", "loss.bin", "said.bin", "index.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (complete / name).read_bytes()
    shutil.rmtree(tmp_path / "stopped" / "work")
    calls = 10
    cached(tmp_path / "stopped", teacher, dataset, batch_tokens=256)
    assert calls == 10 + batches  # three batches of the first try are not run again


def test_wrong_rows_of_the_teacher_are_reported_and_down_weighted_or_stop_the_run(
    student, teacher, dataset, cache, tmp_path
):
    """The labels of rows 3 and 7 say what the teacher has never seen."""
    rows = list(read_rows(dataset / "train.jsonl"))
    for number in (3, 7):
        rows[number - 1] = Row(messages=[rows[number - 1].messages[0], Message(role="assistant", content="zz")])
    lying = tmp_path / "lying"
    shutil.copytree(dataset, lying)
    write_rows(lying / "train.jsonl", rows)
    plain = run(student, teacher, lying, tmp_path / "plain", cache, max_steps=2)
    accuracy = json.loads((tmp_path / "plain" / "out" / "report" / "teacher.json").read_text())["train"]
    assert {3, 7} <= {wrong["row"] for wrong in accuracy["wrong"]}
    assert accuracy["accuracy"] == pytest.approx(1 - len(accuracy["wrong"]) / 40)
    page = (tmp_path / "plain" / "out" / "report" / "teacher.html").read_text()
    assert "<td>3<td>" in page and "<td>7<td>" in page
    left = run(student, teacher, lying, tmp_path / "left", cache, max_steps=2, wrong_row_weight=0)
    assert left.facts["rows"] == 40 - len(accuracy["wrong"])
    half = run(student, teacher, lying, tmp_path / "half", cache, max_steps=2, wrong_row_weight=0.5)
    assert half.metrics["train_ce_loss"] < plain.metrics["train_ce_loss"]
    with pytest.raises(GateFailed, match=r"gets .*% of 10 validation rows right .*min_teacher_accuracy=100"):
        base = ModelDir(pico_model(tmp_path / "random", hidden=64, seed=5))
        run(student, base, dataset, tmp_path / "gate", min_teacher_accuracy=1)
    with pytest.raises(GateFailed, match="max_teacher_loss=0.0001"):
        run(student, teacher, dataset, tmp_path / "loss", cache, max_teacher_loss=0.0001)


def test_a_teacher_with_clipped_norms_is_another_teacher(teacher, dataset, cache, tmp_path):
    clipped = cached(tmp_path / "clipped", teacher, dataset, previous=cache, clip_norms=0.5)
    accuracies = [json.loads((directory / "report" / "teacher.json").read_text()) for directory in (cache, clipped)]
    assert accuracies[1]["validation"]["loss"] != accuracies[0]["validation"]["loss"]
    assert not any(
        "are copied from this teacher's earlier cache" in e["message"] for e in events(clipped / "work", "log")
    )


def test_a_top_k_reads_only_the_temperatures_it_was_made_for(student, teacher, dataset, tmp_path):
    top = cached(tmp_path / "top", teacher, dataset, states_budget_gib=0, top_k=8)
    logs = [event["message"] for event in events(top / "work", "log")]
    assert any("GiB, more than states_budget_gib=0" in text for text in logs)
    assert any("of the mass, KL" in text for text in logs)
    with pytest.raises(BadConfig, match="temperature=1.7: with a cached top k, it must be one of 1, 1.5, 2"):
        run(student, teacher, dataset, tmp_path / "run", top, temperature=1.7)
