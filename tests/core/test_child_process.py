"""The supervisor against a stage that misbehaves, in real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core import child_process
from tasks.core.errors import BadConfig, GateFailed, Killed, NoSpace, OutOfMemory, Preempted, StageError, Stalled
from tests.waiting import wait_until


@pytest.fixture(params=[False, True], ids=["cold", "warm"], autouse=True)
def warm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test with a new interpreter, and with a fork of the fork server."""
    monkeypatch.setitem(WARM, "warm", request.param)
    return bool(request.param)


WARM = {"warm": False}
OnEvent = Callable[[dict[str, Any]], None]


def run(
    tmp_path: Path, act: str, *options: str, on_event: OnEvent | None = None, stall: float = 30, timeout: float = 60
) -> list[dict[str, Any]]:
    """Runs the probe and returns its events, or passes each of them to `on_event`."""
    events: list[dict[str, Any]] = []
    (tmp_path / "config.json").write_text(json.dumps({"act": act}))
    work = tmp_path / "work"
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--work", str(work), *options]
    on_event = on_event or events.append
    child_process.run_command("tests.core.probe", arguments, work, on_event, stall, timeout, WARM["warm"])
    return events


def messages(tmp_path: Path) -> list[str]:
    """The probe's log lines so far."""
    file = tmp_path / "work" / "events.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # the last may be half written
    return [json.loads(line).get("message", "") for line in lines]


def pid_in(tmp_path: Path, word: str) -> int:
    """The process id in the log line that begins with `word`; 0 before there is one."""
    return next((int(text.split()[1]) for text in messages(tmp_path) if text.startswith(word)), 0)


def test_success_writes_report_last_and_forwards_events(tmp_path: Path) -> None:
    events = run(tmp_path, "succeed", "--data", "d", "--models", "m=base+adapter", "--memory-level", "2")
    assert [event["event"] for event in events] == ["log", "progress", "metrics"]
    assert events[2]["values"] == {"loss": 0.5}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"] == {"memory_level": 2, "data": "d", "adapter": "adapter"}
    assert report["stage"] == "probe"
    assert (tmp_path / "work" / "log.txt").read_text().endswith("out; memory_level 2; data d; adapter adapter\n")
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["config"] == {"act": "succeed"}


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        ("gate", GateFailed, "exact match 0.81 is below 0.90"),
        ("value", BadConfig, "learning_rate is -1"),
        ("memory", OutOfMemory, "CUDA out of memory"),
        ("disk", NoSpace, "no space left"),
        ("segfault", Killed, "SIGSEGV"),
        ("killed", Killed, "SIGKILL"),
        ("crash", StageError, "nobody foresaw this"),
    ],
)
def test_exit_codes_become_typed_errors(tmp_path: Path, act: str, error: type[StageError], message: str) -> None:
    with pytest.raises(StageError, match=message) as raised:
        run(tmp_path, act)
    assert type(raised.value) is error
    assert not (tmp_path / "out" / "report.json").exists()


def test_bad_config_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="act"):
        run(tmp_path, 7)  # type: ignore[arg-type]


def test_an_incomplete_model_is_named_with_the_remedy_before_it_is_loaded(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for directory in (base, adapter):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    (base / "tokenizer.json").write_text('{"model": "' + "x" * (1 << 20))  # large, and cut off
    with pytest.raises(BadConfig, match=f"{base}/tokenizer.json is cut off: copy or download it again"):
        run(tmp_path, "succeed", "--models", f"m={base}")
    (base / "tokenizer.json").unlink()
    (adapter / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(BadConfig, match=f"{adapter}/adapter_config.json is not JSON .*: copy or download it again"):
        run(tmp_path, "succeed", "--models", f"m={base}+{adapter}")


def test_a_stale_error_is_not_reported_again(tmp_path: Path) -> None:
    with pytest.raises(GateFailed):
        run(tmp_path, "gate")
    run(tmp_path, "succeed")
    assert not (tmp_path / "work" / "error.json").exists()


def test_stall_is_seen_and_its_stacks_are_shown(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="in probe"):
        run(tmp_path, "hang", stall=3)
    assert not psutil.pid_exists(pid_in(tmp_path, "pid"))


def test_time_limit(tmp_path: Path) -> None:
    with pytest.raises(Stalled, match="still running"):
        run(tmp_path, "hang", timeout=2)


def test_a_checkpoint_is_saved_on_sigterm(tmp_path: Path) -> None:
    def terminate(event: dict[str, Any]) -> None:
        if event.get("message") == "training":
            os.kill(pid_in(tmp_path, "pid"), signal.SIGTERM)

    with pytest.raises(Preempted, match="same command"):
        run(tmp_path, "checkpoint", on_event=terminate)
    assert (tmp_path / "work" / "checkpoint").read_text() == "saved"


def test_interrupting_the_parent_leaves_no_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child and a grandchild that ignore SIGTERM are killed when the parent is interrupted."""
    monkeypatch.setattr(child_process.stop_tree, "__defaults__", (1.0,))

    def interrupt(event: dict[str, Any]) -> None:
        if str(event.get("message", "")).startswith("grandchild"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "stubborn", on_event=interrupt)
    assert not psutil.pid_exists(pid_in(tmp_path, "pid"))
    assert not psutil.pid_exists(pid_in(tmp_path, "grandchild"))


def test_the_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"act": "hang"}))
    code = (
        "import sys; from pathlib import Path; from tasks.core.child_process import run_command; t = Path(sys.argv[1]);"
        "run_command('tests.core.probe', [str(t/'config.json'), '--out', str(t/'out'), '--work', str(t/'work')],"
        f"t/'work', lambda event: None, 60, 60, {WARM['warm']})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    pid = wait_until(lambda: pid_in(tmp_path, "pid"), 120)
    parent.kill()
    parent.wait()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid)


def test_the_fork_server_is_free_for_the_next_command(tmp_path: Path) -> None:
    for act, error in (("killed", Killed), ("hang", Stalled), ("gate", GateFailed)):
        with pytest.raises(error):
            run(tmp_path, act, stall=1.5 if act == "hang" else 30)
    run(tmp_path, "succeed")
    assert not child_process.FORK_SERVER._lock.locked()


def test_a_command_is_named_after_its_stage(tmp_path: Path) -> None:
    names: list[str] = []

    def read_name(event: dict[str, Any]) -> None:
        if str(event.get("message", "")).startswith("pid"):
            names.append(Path(f"/proc/{event['message'].split()[1]}/comm").read_text().strip())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "hang", on_event=read_name)
    assert names == ["stage:core"]
