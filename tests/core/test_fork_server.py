"""The warm process where it or its parent is slow, interrupted or killed: what a busy machine does to them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core import child
from tasks.core.errors import Killed, Stalled
from tasks.core.fork_server import PRELOAD, Nursery


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which nothing can be imported beforehand, so that the warm process starts at once."""
    for name in PRELOAD:
        (tmp_path / "none" / name.partition(".")[0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "none" / name.partition(".")[0] / "__init__.py").write_text("raise ImportError")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "none"), "STILLHOUSE_PARENT": str(os.getpid())}


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    made = Nursery()
    monkeypatch.setattr(child, "NURSERY", made)
    yield made
    if made._process:
        made._process.kill()


class Slow(Nursery):
    """The other half of a machine that has better things to do than to listen."""

    def _hear(self) -> bytes:
        time.sleep(0.7)
        return super()._hear()


def code_of(child: Any, seconds: float = 10) -> int | None:
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return child.returncode


def test_a_command_that_ends_before_anybody_listens_is_seen_to_end(environment: dict[str, str], tmp_path: Path) -> None:
    slow = Slow()
    quick = slow.start("this", [], tmp_path / "log.txt", environment)
    assert quick and code_of(quick) == 0
    assert "Beautiful is better than ugly" in (tmp_path / "log.txt").read_text()


def test_a_warm_process_that_died_meanwhile_is_no_error(
    nursery: Nursery, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = nursery.start("this", [], tmp_path / "log.txt", environment)
    assert first and code_of(first) == 0
    process = nursery._process
    assert process
    process.send_signal(signal.SIGKILL)
    process.wait()
    with monkeypatch.context() as patched:
        patched.setattr(process, "poll", lambda: None)  # looked at just before it died
        assert nursery.start("this", [], tmp_path / "log.txt", environment) is None
    again = nursery.start("this", [], tmp_path / "log.txt", environment)
    assert again and code_of(again) == 0


def test_an_interrupted_start_leaves_nothing_behind(environment: dict[str, str], tmp_path: Path) -> None:
    class Interrupted(Nursery):
        def _hear(self) -> bytes:
            self.pid = json.loads(super()._hear())["pid"]
            raise KeyboardInterrupt

    interrupted = Interrupted()
    (tmp_path / "config.json").write_text('{"act": "sleep"}')
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        interrupted.start("tests.core.probe", arguments, tmp_path / "log.txt", environment)
    assert not interrupted._lock.locked()
    assert ends(interrupted.pid)


def ends(pid: int, seconds: float = 10) -> bool:
    """Whether the process, nobody's child any more, ends soon; a zombie has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_the_warm_process_outlives_the_thread_that_started_it(
    nursery: Nursery, environment: dict[str, str], tmp_path: Path
) -> None:
    def start() -> None:
        begun = nursery.start("this", [], tmp_path / "log.txt", environment)
        assert begun and code_of(begun) == 0

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert nursery._process and nursery._process.poll() is None


def test_a_command_does_not_outlive_its_warm_process(
    nursery: Nursery, environment: dict[str, str], tmp_path: Path
) -> None:
    """Not even one that ignores SIGTERM: the next try will use its directory."""
    (tmp_path / "config.json").write_text('{"act": "stubborn"}')
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    pids: list[int] = []

    def kill(event: dict[str, Any]) -> None:
        name, _, pid = str(event.get("message", "")).partition(" ")
        if name in ("pid", "grandchild"):
            pids.append(int(pid))
        if name == "grandchild":
            assert nursery._process
            nursery._process.kill()

    # The command's environment is made by run_command: only the warm process has to be light.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", environment["PYTHONPATH"])
        with pytest.raises(Killed):
            child.run_command("tests.core.probe", arguments, tmp_path / "work", kill, 30, 60, warm=True)
    os.kill(pids[1], signal.SIGKILL)
    assert ends(pids[0])


def test_a_command_may_be_late_with_its_log_and_gone_before_its_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Nursery):
        def start(self, *_: Any) -> Any:
            return subprocess.Popen(["sleep", "0.5"])

    monkeypatch.setattr(child, "NURSERY", Late())
    child.run_command("any", [], tmp_path / "work", lambda event: None, 30, 60, warm=True)

    class Gone(Nursery):
        def start(self, *_: Any) -> Any:
            gone = subprocess.Popen(["true"])
            gone.wait()
            monkeypatch.setattr(gone, "poll", lambda: None)  # its end is known to who reaped it, not yet to us
            return gone

    monkeypatch.setattr(child, "NURSERY", Gone())
    monkeypatch.setattr(child._wait, "__defaults__", (0.1,))
    with pytest.raises(Stalled):
        child.run_command("any", [], tmp_path / "work", lambda event: None, 0.3, 60, warm=True)

    done = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def ended(self: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        done.communicate(b"\n")
        return []

    monkeypatch.setattr(psutil.Process, "children", ended)
    child.stop_tree(done.pid)
    assert done.returncode == 0
