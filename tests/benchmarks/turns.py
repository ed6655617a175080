"""Taking turns on one GPU: contestants warm up side by side, then each is timed while all others are stopped.

A contestant calls `wait_for_turn` and `end_turn`; `take_turns` starts them all and hands the turns out.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LAST_WORDS = 1.0  # seconds after its turn in which a contestant may end before it is stopped


def wait_for_turn(directory: Path, name: str) -> None:
    """Returns when the others are stopped; at once for one that runs by itself."""
    (directory / f"{name}.ready").touch()
    while "TURNS" in os.environ and not (directory / f"{name}.turn").exists():
        time.sleep(0.02)


def end_turn(directory: Path, name: str) -> None:
    """Lets the next one run."""
    (directory / f"{name}.done").touch()


def take_turns(
    directory: Path, names: list[str], command: Callable[[str], list[str]], patience: float, stop: bool = True
) -> None:
    """Runs the contestants to their ends, their output in `NAME.log`; who is not ready after `patience` s is ended.

    Without `stop` those who wait only sleep: processes of torchrun's are in sessions of their own.
    """
    halt = signal.SIGSTOP if stop else signal.SIGCONT
    children = {}
    for name in names:
        for mark in ("ready", "turn", "done"):
            (directory / f"{name}.{mark}").unlink(missing_ok=True)
        log = (directory / f"{name}.log").open("w")
        children[name] = subprocess.Popen(
            command(name), stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TURNS": "1"}, start_new_session=True
        )
    deadline = time.monotonic() + patience

    def wait(name: str, mark: str, until: float) -> bool:
        while children[name].poll() is None and not (directory / f"{name}.{mark}").exists():
            if time.monotonic() > until:
                _signal(children[name], signal.SIGKILL)
            time.sleep(0.02)
        return children[name].poll() is None

    ready = [name for name in names if wait(name, "ready", deadline)]
    for name in ready:
        _signal(children[name], halt)
    for name in ready:
        (directory / f"{name}.turn").touch()
        _signal(children[name], signal.SIGCONT)
        wait(name, "done", time.monotonic() + 60)
        with contextlib.suppress(subprocess.TimeoutExpired):
            children[name].wait(timeout=LAST_WORDS if stop else 20 * LAST_WORDS)
        _signal(children[name], halt)
    for child in children.values():
        _signal(child, signal.SIGCONT)
    for child in children.values():  # all have told what they had to tell: some peers never end by themselves
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5 * LAST_WORDS)
        _signal(child, signal.SIGKILL)
        child.wait()


def _signal(child: "subprocess.Popen[bytes]", number: int) -> None:
    """To all processes of a contestant's session: compilers have workers."""
    if child.poll() is None:
        os.killpg(child.pid, number)
