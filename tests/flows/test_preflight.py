"""Preflight: what would fail after an hour is found in seconds, with its remedy; what is fine is not complained of."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.audit import AuditConfig
from flows.cards import Card, smallest_card
from flows.config import PipelineConfig
from flows.preflight import machine, preflight, require_none_failed
from flows.preflight.needs import check_top_k, first_file, needed_bytes
from tasks.core.errors import BadConfig
from tasks.core.settings import Settings
from tasks.engine.data.chat_template import Example
from tasks.preflight import Check, PreflightConfig
from tasks.preflight.first_rows import check_lengths

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
    monkeypatch.setattr(machine, "smallest_card", lambda processes: Card("L4", 22.5))
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


def test_a_full_disk_does_not_stop_a_run_whose_inputs_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PipelineConfig.model_validate({"preset": "quickstart"})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for state in ("fail", "warn"):
        _, checks = machine.check_machine(config, Settings(home=tmp_path))
        assert [check.state for check in checks if check.name == "disk"] == [state]
        (tmp_path / "inputs").mkdir(exist_ok=True)


@pytest.mark.parametrize("source", ["{}/part *.jsonl", "{}/odd[1].jsonl", "{}"])
def test_rows_are_found_by_absolute_patterns_and_odd_names(source: str, tmp_path: Path) -> None:
    for name in ("part one.jsonl", "odd[1].jsonl"):
        (tmp_path / name).write_text("{}\n")
    config = PipelineConfig.model_validate({"preset": "quickstart", "train": source.format(tmp_path)})
    rows, problem = first_file(config)
    assert rows is not None and rows.parent == tmp_path and problem is None


@pytest.mark.parametrize("host", ["user:secret@127.0.0.1", "user:secret@127.0.0.1:1"])
def test_a_password_of_mlflow_is_not_printed(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{host}")
    monkeypatch.setattr(machine, "SECONDS", 0.2)
    _, checks = machine.check_machine(None, Settings(home=tmp_path))
    [check] = [check for check in checks if check.name == "MLflow"]
    assert check.state == "warn" and "127.0.0.1" in check.result and "secret" not in check.result


def test_only_the_cards_that_a_run_uses_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [2.0, 24.0, 80.0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    for name, value in (("Init", None), ("Shutdown", None), ("DeviceGetCount", 3)):
        monkeypatch.setattr(f"flows.cards.pynvml.nvml{name}", lambda value=value: value)
    monkeypatch.setattr("flows.cards.pynvml.nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr("flows.cards._card", lambda index: Card("card", sizes[index]))
    assert [smallest_card(processes) for processes in (1, 2, 3)] == [Card("card", size) for size in (80.0, 24.0, 2.0)]
    for visible, gib in (("1", 24.0), ("1,2", 24.0), ("", None), ("-1", None), ("7", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        card = smallest_card()
        assert (card.gib if card else None) == gib
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert smallest_card() == Card("card", 2.0)


def test_an_audit_of_weights_asks_for_no_template_and_no_common_tokenizer(tmp_path: Path) -> None:
    base = shutil.copytree(QUICKSTART / "student", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    config = AuditConfig(models={"teacher": str(QUICKSTART / "teacher"), "student": str(base)})
    checks = preflight(config, Settings(home=tmp_path / "home"))
    assert [check for check in checks if check.state == "fail"] == []


@pytest.mark.parametrize(("over_long", "state"), [("drop", "fail"), ("cut", "warn"), ("fail", "fail")])
def test_rows_that_are_cut_do_not_stop_a_run(over_long: str, state: str) -> None:
    examples = [Example(list(range(30)), [1] * 30)]
    [check] = check_lengths(PreflightConfig(max_length=20, over_long=over_long), examples)
    assert check.state == state
