"""The fork server where it or its parent is slow, interrupted or killed, as happens on a busy machine."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core import child_process
from tasks.core.errors import Killed, Stalled
from tasks.core.fork_server import PRELOAD, ForkServer
from tests.waiting import wait_until


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment without the libraries to preload, so that the fork server starts at once."""
    for name in PRELOAD:
        (tmp_path / "none" / name.partition(".")[0]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "none" / name.partition(".")[0] / "__init__.py").write_text("raise ImportError")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "none"), "STILLHOUSE_PARENT": str(os.getpid())}


@pytest.fixture
def fork_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    server = ForkServer()
    monkeypatch.setattr(child_process, "FORK_SERVER", server)
    yield server
    if server._process:
        server._process.kill()


def code_of(child: Any) -> int | None:
    """The exit code of a child that ends soon."""
    wait_until(lambda: child.poll() is not None, 10)
    code: int | None = child.returncode
    return code


def test_a_command_that_ends_before_its_parent_listens_is_seen_to_end(
    environment: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"

    class Slow(ForkServer):
        """Reads a response only when the command has ended."""

        def _receive(self) -> bytes:
            assert self._process
            server = psutil.Process(self._process.pid)
            wait_until(lambda: log.exists() and "Namespaces" in log.read_text() and not server.children())
            return super()._receive()

    command = Slow().start("this", [], log, environment)
    assert command and code_of(command) == 0
    assert "Beautiful is better than ugly" in log.read_text()


def test_a_fork_server_that_died_meanwhile_is_started_again(
    fork_server: ForkServer, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fork_server.start("this", [], tmp_path / "log.txt", environment)
    assert first and code_of(first) == 0
    process = fork_server._process
    assert process
    process.send_signal(signal.SIGKILL)
    process.wait()
    with monkeypatch.context() as patched:
        patched.setattr(process, "poll", lambda: None)  # it died just after it was polled
        assert fork_server.start("this", [], tmp_path / "log.txt", environment) is None
    second = fork_server.start("this", [], tmp_path / "log.txt", environment)
    assert second and code_of(second) == 0


def test_an_interrupted_start_leaves_nothing_behind(environment: dict[str, str], tmp_path: Path) -> None:
    class Interrupted(ForkServer):
        def _receive(self) -> bytes:
            self.pid = json.loads(super()._receive())["pid"]
            raise KeyboardInterrupt

    interrupted = Interrupted()
    (tmp_path / "config.json").write_text('{"act": "hang"}')
    arguments = [str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        interrupted.start("tests.core.probe", arguments, tmp_path / "log.txt", environment)
    assert not interrupted._lock.locked()
    wait_until(lambda: has_ended(interrupted.pid), 10)


def has_ended(pid: int) -> bool:
    """Whether a process that is nobody's child any more has ended; a zombie has."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_fork_server_outlives_the_thread_that_started_it(
    fork_server: ForkServer, environment: dict[str, str], tmp_path: Path
) -> None:
    def start() -> None:
        command = fork_server.start("this", [], tmp_path / "log.txt", environment)
        assert command and code_of(command) == 0

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    wait_until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())  # the kernel sends its signals before
    process = fork_server._process
    start()
    assert process and fork_server._process is process and process.poll() is None


def test_a_command_does_not_outlive_the_fork_server(
    fork_server: ForkServer, environment: dict[str, str], tmp_path: Path
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
            assert fork_server._process
            fork_server._process.kill()

    # The command's environment is made by run_command: only the fork server has to be light.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", environment["PYTHONPATH"])
        with pytest.raises(Killed):
            child_process.run_command("tests.core.probe", arguments, tmp_path / "work", kill, 30, 60, warm=True)
    os.kill(pids[1], signal.SIGKILL)
    wait_until(lambda: has_ended(pids[0]), 10)


def test_a_command_may_be_late_with_its_log_and_gone_before_its_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(ForkServer):
        def start(self, *_: Any) -> Any:
            command = subprocess.Popen(["true"])
            command.wait()
            polls = iter([None, None, 0])
            monkeypatch.setattr(command, "poll", lambda: next(polls))  # two rounds of the supervisor without a log
            return command

    monkeypatch.setattr(child_process, "FORK_SERVER", Late())
    child_process.run_command("any", [], tmp_path / "work", lambda event: None, 30, 60, warm=True)

    class Reaped(ForkServer):
        def start(self, *_: Any) -> Any:
            command = subprocess.Popen(["true"])
            command.wait()
            monkeypatch.setattr(command, "poll", lambda: None)  # reaped, and its end not yet reported
            return command

    monkeypatch.setattr(child_process, "FORK_SERVER", Reaped())
    monkeypatch.setattr(child_process._reap, "__defaults__", (0.1,))
    with pytest.raises(Stalled):
        child_process.run_command("any", [], tmp_path / "work", lambda event: None, 0.3, 60, warm=True)

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def end_process(self: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        process.communicate(b"\n")
        return []

    monkeypatch.setattr(psutil.Process, "children", end_process)
    child_process.stop_tree(process.pid)
    assert process.returncode == 0
