"""Preflight: what would fail after an hour is found in seconds, with its remedy; what is fine is not complained of."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cards import Card
from flows.config import PipelineConfig
from flows.preflight import machine, preflight, require_none_failed
from flows.preflight.needs import check_top_k, first_file, needed_bytes
from tasks.core.errors import BadConfig
from tasks.core.settings import Settings
from tasks.preflight import Check

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deployments" / "quickstart"


@pytest.fixture(autouse=True)
def quickstart_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative paths of the preset; no hub."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def checked(tmp_path: Path, **settings: Any) -> dict[str, Check]:
    config = PipelineConfig.model_validate({"preset": "quickstart", **settings})
    return {check.name: check for check in preflight(config, Settings(home=tmp_path))}


def test_the_quickstart_is_ready(tmp_path: Path) -> None:
    checks = checked(tmp_path)
    assert {check.state for check in checks.values()} == {"ok"}
    assert "108 tokens" in checks["first rows"].result and "2,048 pieces" in checks["tokenizers"].result
    assert not list(tmp_path.glob("preflight-*")), "nothing is left behind"


def test_what_would_fail_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one go, for each costs the import of torch."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    broken = shutil.copytree(QUICKSTART / "student", tmp_path / "student")
    tokenizer = (broken / "tokenizer.json").read_text()
    (broken / "tokenizer.json").write_text(tokenizer.replace('"<mask>"', '"<musk>"'))
    (broken / "chat_template.jinja").unlink()
    checks = checked(
        tmp_path / "home", student_base=str(broken), max_length=60, teacher={"memory_gib": 0.2},
        student={"optimizer": "adamw_8bit"},
    )  # fmt: skip
    assert checks["MLflow"].state == "warn" and "MLFLOW_TRACKING_URI" in checks["MLflow"].remedy
    assert checks["device"].state == "fail" and "student.optimizer=adamw_8bit" in checks["device"].result
    assert checks["chat template of student"].remedy.startswith("set chat_template: gemma")
    assert checks["tokenizers"].state == "fail" and "<musk>" in checks["tokenizers"].result
    with pytest.raises(BadConfig, match=r"(?s)does not start:.*device: .*chat template of student: .*tokenizers: "):
        require_none_failed(list(checks.values()))


def test_memory_and_lengths_are_checked_by_the_first_rows(tmp_path: Path) -> None:
    checks = checked(tmp_path, max_length=60, teacher={"memory_gib": 0.2}, student={"memory_gib": 24})
    assert checks["first rows"].state == "warn" and "171 are longer and are left out" in checks["first rows"].result
    assert checks["memory of teacher"].state == "fail" and "0.2 GiB" in checks["memory of teacher"].result
    assert checks["memory of student"].state == "ok" and "micro-batch 16" in checks["memory of student"].result


def test_bases_that_are_not_there_or_not_complete_are_found(tmp_path: Path) -> None:
    cut = shutil.copytree(QUICKSTART / "teacher", tmp_path / "teacher")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:100_000])
    checks = checked(tmp_path / "home", teacher_base=str(cut), student_base="nobody/nothing", train="no/rows.jsonl")
    assert checks["model teacher"].state == "fail" and "cut off" in checks["model teacher"].result
    assert checks["model student"].state == "fail" and "nobody/nothing" in checks["model student"].result
    assert checks["first rows"].state == "fail" and "nothing at" in checks["first rows"].result


def test_a_card_needs_a_compiler_and_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "smallest_card", lambda: Card("L4", 22.5))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    card, checks = machine.check_machine(None, Settings(home=tmp_path))
    [compiler] = [check for check in checks if check.name == "C compiler"]
    assert card == 22.5 and compiler.state == "fail" and "gcc" in compiler.remedy


def test_a_full_disk_and_missing_libraries_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PipelineConfig.model_validate({"preset": "quickstart"})
    least, likely = needed_bytes(config, store_on_disk=True)
    assert 1e7 < least < likely < 1e9
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(free=int(least * 1.01)))
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "peft" else object())
    _, checks = machine.check_machine(config, Settings(home=tmp_path))
    states = {check.name: check for check in checks}
    assert states["disk"].state == "warn" and states["torch stack"].state == "fail"
    assert "peft" in states["torch stack"].result and "stillhouse[gpu]" in states["torch stack"].remedy


def test_rows_from_afar_are_left_for_the_run(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate({"preset": "quickstart", "train": "hub:owner/name"})
    assert first_file(config) == (None, Check("first rows", "ok", "hub:owner/name is looked at when it is fetched"))


def test_a_top_k_that_is_not_needed_is_warned_of() -> None:
    config = PipelineConfig.model_validate({"preset": "quickstart", "student": {"top_k": 8}})
    [check] = check_top_k(config)
    assert check.state == "warn" and "student.top_k has no effect" in check.result
    small = {"preset": "quickstart", "student": {"top_k": 8, "states_budget_gib": 0}}
    assert not list(check_top_k(PipelineConfig.model_validate(small)))
