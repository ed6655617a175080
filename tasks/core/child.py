"""Runs a stage's command in a child process, follows its events, and never leaves it behind.

A child, because a CUDA assert or an out-of-memory error poisons its process, because memory is really free when a
process ends, and because a process can be killed. It stays in our session, so that whoever kills our process group
kills it too, and asks the kernel for SIGTERM when we die.
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
from tasks.core.fork_server import Nursery, WarmChild

POLL_SECONDS = 0.1
GRACE_SECONDS = 20.0  # Prefect's own grace for a cancelled run is 30 s for the whole process group
LOG_LINES = 30
OF_TORCHRUN = 80  # lines at most, with their beginning
TORCHRUN = "torch/distributed/elastic/multiprocessing/api.py"
NURSERY = Nursery()


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
    """Runs `python -m module arguments` to its end, `warm` or in a new interpreter; returns when it exits with 0.

    Several `processes` are started by torchrun (tasks.core.launch).

    Its output goes to `<work>/log.txt`, its events (`<work>/events.jsonl`) to `on_event` as they come. Raises the
    error that its exit code stands for, with its own message or the end of its log; `Stalled` when neither file
    grows for `stall_seconds` or it runs past `timeout_seconds`. Whatever ends this function early (cancellation,
    a time-out, Ctrl-C) stops the child first: SIGTERM, 20 s, SIGKILL, for it and all its descendants.
    """
    work.mkdir(parents=True, exist_ok=True)
    log, events = work / "log.txt", work / "events.jsonl"
    log.touch()  # a fork of a busy machine makes it late
    events.touch()
    environment = {
        "GOMP_SPINCOUNT": "20000",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # what is freed can be used again whatever its size
        **os.environ,
    }  # OpenMP's default spins: see docs/benchmarks.md
    environment |= {"STILLHOUSE_PARENT": str(os.getpid()), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with events.open(encoding="utf-8") as stream:
        stream.seek(0, os.SEEK_END)
        if processes > 1:
            arguments = [str(processes), module, *arguments]
            child: subprocess.Popen[bytes] | WarmChild = _start("tasks.core.launch", arguments, log, environment)
        else:
            child = (NURSERY.start(module, arguments, log, environment) if warm else None) or _start(
                module, arguments, log, environment
            )
        try:
            _follow(child, log, events, stream, on_event, stall_seconds, timeout_seconds)
        except BaseException:
            stop_tree(child.pid)
            _wait(child)
            _forward(stream, on_event)  # what it said while it saved its last checkpoint
            raise
        _forward(stream, on_event)
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


def _wait(child: "subprocess.Popen[bytes] | WarmChild", seconds: float = 5.0) -> None:
    """Takes the exit code of a child that was stopped."""
    deadline = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _follow(
    child: "subprocess.Popen[bytes] | WarmChild", log: Path, events: Path, stream: Any,
    on_event: Callable[[dict[str, Any]], None], stall_seconds: float, timeout_seconds: float,
) -> None:  # fmt: skip
    started = alive = time.monotonic()
    sizes = (-1, -1)
    while child.poll() is None:
        time.sleep(POLL_SECONDS)
        _forward(stream, on_event)
        grown = (log.stat().st_size, events.stat().st_size)
        now = time.monotonic()
        if grown != sizes:
            sizes, alive = grown, now
        if now - alive > stall_seconds:
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(child.pid, signal.SIGUSR1)  # faulthandler writes every thread's stack to the log
            time.sleep(1)
            raise Stalled(f"no sign of life for {stall_seconds:.0f} s; stopped. Its stacks:\n{tail(log)}")
        if now - started > timeout_seconds:
            raise Stalled(f"still running after {timeout_seconds:.0f} s (STILLHOUSE_TIMEOUT_SECONDS); stopped")


def _forward(stream: Any, on_event: Callable[[dict[str, Any]], None]) -> None:
    """Hands over the complete lines; a line still being written is left for the next time."""
    while True:
        position = stream.tell()
        line = stream.readline()
        if not line.endswith("\n"):
            stream.seek(position)
            return
        on_event(json.loads(line))


def _error(module: str, code: int, work: Path) -> StageError:
    kind = Killed if code < 0 else BY_EXIT_CODE.get(code, StageError)
    told = work / "error.json"
    if code > 0 and told.exists():
        error = json.loads(told.read_text())
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
    """The last lines of a log, each cut at 500 characters, without those in which torchrun says that its processes
    ended."""
    if not path.exists():
        return ""
    told = path.read_text(errors="replace").splitlines()
    late = range(max(0, len(told) - OF_TORCHRUN), len(told))
    end = next((number for number in late if TORCHRUN in told[number]), len(told))
    return "\n".join(line[:500] for line in told[:end][-lines:])


def stop_tree(pid: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """SIGTERM to the process, which tells its own children (torchrun does); SIGKILL to all that is left."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with suppress(psutil.NoSuchProcess):  # another process reaps a warm child
        root.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
