"""Runs a stage's command in a child process, forwards its events, and stops it whenever the parent is stopped.

A child, because a CUDA assert or an out-of-memory error poisons its process, because memory is really free when a
process ends, and because a process can be killed. It stays in the parent's session, so that a signal to the process
group reaches it too, and asks the kernel for SIGTERM when the parent dies.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tasks.core.errors import BY_EXIT_CODE, Killed, StageError, Stalled
from tasks.core.fork_server import ForkedCommand, ForkServer

POLL_SECONDS = 0.1
GRACE_SECONDS = 20.0  # Prefect's own grace for a cancelled run is 30 s for the whole process group
LOG_LINES = 30
TORCHRUN_LINES = 80  # at most, of torchrun's own report at the end of a log, which begins with this file's name:
TORCHRUN = "torch/distributed/elastic/multiprocessing/api.py"
FORK_SERVER = ForkServer()


def run_command(
    module: str,
    arguments: Sequence[str],
    work: Path,
    on_event: Callable[[dict[str, Any]], None],
    stall_seconds: float,
    timeout_seconds: float,
    warm: bool = False,
    processes: int = 1,
) -> None:
    """Runs `python -m module arguments` and returns when it exits with 0.

    `warm` forks it off the process that has imported torch (tasks.core.fork_server) instead of starting an
    interpreter; several `processes` are started by torchrun (tasks.core.launch).

    Its output goes to `<work>/log.txt`, its events (`<work>/events.jsonl`) to `on_event` as they come. Raises the
    error that its exit code stands for, with its own message or the end of its log; `Stalled` when neither file
    grows for `stall_seconds` or it runs past `timeout_seconds`. Whatever ends this function early (cancellation,
    a time-out, Ctrl-C) stops the child first: SIGTERM, 20 s, SIGKILL, for it and all its descendants.
    """
    work.mkdir(parents=True, exist_ok=True)
    log, events = work / "log.txt", work / "events.jsonl"
    log.touch()  # on a busy machine the fork creates it late
    events.touch()
    environment = {
        "GOMP_SPINCOUNT": "20000",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # freed memory serves allocations of any size
        **os.environ,
    }  # OpenMP's default spins: see docs/benchmarks/quickstart.md
    environment |= {"STILLHOUSE_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with events.open(encoding="utf-8") as stream:
        stream.seek(0, os.SEEK_END)
        if processes > 1:
            arguments = [str(processes), module, *arguments]
            child: subprocess.Popen[bytes] | ForkedCommand = _start("tasks.core.launch", arguments, log, environment)
        else:
            child = (FORK_SERVER.start(module, arguments, log, environment) if warm else None) or _start(
                module, arguments, log, environment
            )
        try:
            _supervise(child, log, events, stream, on_event, stall_seconds, timeout_seconds)
        except BaseException:
            stop_tree(child.pid)
            _reap(child)
            _forward_events(stream, on_event)  # those of its last checkpoint
            raise
        _forward_events(stream, on_event)
    if child.returncode:
        raise _error(module, child.returncode, work)


def _start(
    module: str, arguments: Sequence[str], log: Path, environment: dict[str, str]
) -> "subprocess.Popen[bytes]":  # fmt: skip
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def _reap(child: "subprocess.Popen[bytes] | ForkedCommand", seconds: float = 5.0) -> None:
    """Waits for the exit code of a child that was stopped."""
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _supervise(
    child: "subprocess.Popen[bytes] | ForkedCommand", log: Path, events: Path, stream: Any,
    on_event: Callable[[dict[str, Any]], None], stall_seconds: float, timeout_seconds: float,
) -> None:  # fmt: skip
    """Forwards events until the child ends; raises `Stalled` when it shows no activity or runs too long."""
    started = last_growth = time.monotonic()
    sizes = (-1, -1)
    while child.poll() is None:
        time.sleep(POLL_SECONDS)
        _forward_events(stream, on_event)
        new_sizes = (log.stat().st_size, events.stat().st_size)
        current = time.monotonic()
        if new_sizes != sizes:
            sizes, last_growth = new_sizes, current
        if current - last_growth > stall_seconds:
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(child.pid, signal.SIGUSR1)  # faulthandler writes every thread's stack to the log
            time.sleep(1)
            raise Stalled(f"no sign of life for {stall_seconds:.0f} s; stopped. Its stacks:\n{tail(log)}")
        if current - started > timeout_seconds:
            raise Stalled(f"still running after {timeout_seconds:.0f} s (STILLHOUSE_TIMEOUT_SECONDS); stopped")


def _forward_events(stream: Any, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Passes the complete lines on; a line still being written stays for the next call."""
    while True:
        position = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(position)
            return
        on_event(json.loads(line))


def _error(module: str, code: int, work: Path) -> StageError:
    """The typed error of a command that ended with `code` (negative: a signal), with its message or its log's end."""
    kind = Killed if code < 0 else BY_EXIT_CODE.get(code, StageError)
    error_file = work / "error.json"
    if code > 0 and error_file.exists():
        error = json.loads(error_file.read_text())
        kind = BY_EXIT_CODE.get(error["code"], kind)  # torchrun exits with 1, whatever its processes did
        message = error["message"]
    elif code < 0:
        name = signal.Signals(-code).name
        hint = " (the host's memory may have run out: see dmesg)" if name == "SIGKILL" else ""
        message = f"{module} was ended by {name}{hint}. The end of its log:\n{tail(work / 'log.txt')}"
    else:
        message = f"{module} exited with {code}. The end of its log:\n{tail(work / 'log.txt')}"
    return kind(message)


def tail(path: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, each cut at 500 characters, without torchrun's own report of ended processes."""
    if not path.exists():
        return ""
    log = path.read_text(errors="replace").splitlines()
    last = range(max(0, len(log) - TORCHRUN_LINES), len(log))
    end = next((number for number in last if TORCHRUN in log[number]), len(log))
    return "\n".join(line[:500] for line in log[:end][-lines:])


def stop_tree(pid: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """Sends SIGTERM to the process, which stops its own children (torchrun does), then SIGKILL to all that remain."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with suppress(psutil.NoSuchProcess):  # the fork server reaps a forked command
        root.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
