"""What a teacher says of every answer token: kept, found again, grown, gone on with, examined."""

import json
import shutil

import pytest
import torch

from tasks.core.errors import BadConfig, GateFailed
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row, read_rows, write_rows
from tests.distill.runs import events, kept, run
from tests.engine.rows import example_dataset
from tests.pico import pico_model


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
    from tasks.distill.teacher_cache import progress_marker
    from tasks.distill.teacher_cache import teacher_pass as module

    whole = kept(tmp_path / "whole", teacher, dataset, batch_tokens=256)
    monkeypatch.setattr(progress_marker, "SECONDS_BETWEEN_MARKS", -1)
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


def test_a_teacher_with_clipped_norms_is_another_teacher(teacher, dataset, states, tmp_path):
    clipped = kept(tmp_path / "clipped", teacher, dataset, known=states, clip_norms=0.5)
    exams = [json.loads((directory / "report" / "teacher.json").read_text()) for directory in (states, clipped)]
    assert exams[1]["validation"]["loss"] != exams[0]["validation"]["loss"]
    assert not any("were asked of this teacher before" in e["message"] for e in events(clipped / "work", "log"))


def test_a_top_k_reads_only_the_temperatures_it_was_made_for(student, teacher, dataset, tmp_path):
    top = kept(tmp_path / "top", teacher, dataset, states_budget_gib=0, top_k=8)
    logs = [event["message"] for event in events(top / "work", "log")]
    assert any("GiB, more than states_budget_gib=0" in text for text in logs)
    assert any("of the mass is the tail's, KL" in text for text in logs)
    with pytest.raises(BadConfig, match="temperature=1.7: with the top k kept, it must be one of 1, 1.5, 2"):
        run(student, teacher, dataset, tmp_path / "run", top, temperature=1.7)
