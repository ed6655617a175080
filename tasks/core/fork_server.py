"""A warm start for stage commands: one process imports torch and transformers once, and every command is forked off it.

Importing them takes 5 to 10 s on two cores, eighteen times in the quickstart. The fork runs the same module as
`python -m` does and dies as it does; nothing it allocates stays. Not used where a CUDA device is: CUDA does not survive
a fork, and beside a real model's training the seconds do not count.

The protocol, a line of JSON each: {"module", "arguments", "log", "environment"} in; {"pid"}, then {"code"} out.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks.core.parent_process import die_with_parent, name_process

PRELOAD = [
    "torch",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "peft",
    "matplotlib.pyplot",
    "gguf",
]
# The kernel's parent is a thread: a warm process started by one that ends would be told to die with it.
STARTER = ThreadPoolExecutor(1, thread_name_prefix="warm")


class WarmChild:
    """A forked command, with the parts of `subprocess.Popen` that its supervisor needs."""

    def __init__(self, pid: int, nursery: "Nursery") -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and (code := self._nursery.exit_code(self.pid)) is not None:
            self.returncode = code
        return self.returncode


class Nursery:
    """The warm process of this process, started on first use; one command at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, module: str, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> WarmChild | None:
        """Runs the module in a fork; None when another command runs in one already, or the warm process is gone."""
        if not self._lock.acquire(blocking=False):
            return None
        child = None
        try:
            self._warm_up(environment)
            request = {"module": module, "arguments": list(arguments), "log": str(log), "environment": environment}
            with contextlib.suppress(BrokenPipeError):  # it died since it was last looked at
                self._say(json.dumps(request).encode() + b"\n")
            if told := self._hear():  # nothing where it could not even import: let the command itself say why
                child = WarmChild(json.loads(told)["pid"], self)
        finally:
            if child is None:  # interrupted, too: a command that nobody follows must not start
                if self._process:
                    self._process.kill()
                    self._process.wait()
                self._lock.release()
        return child

    def exit_code(self, pid: int) -> int | None:
        """The exit code of the running fork, once; a warm process that died takes it along."""
        assert self._process and self._process.stdout
        if not select.select([self._process.stdout], [], [], 0)[0]:
            return None
        told = self._hear()
        if not told:  # the fork was told to stop, and may take its time: the next try needs its directory
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._lock.release()
        return int(json.loads(told)["code"]) if told else -signal.SIGKILL

    def _warm_up(self, environment: dict[str, str]) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = STARTER.submit(
                subprocess.Popen,
                [sys.executable, "-m", "tasks.core.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=environment, bufsize=0,
            ).result()  # fmt: skip

    def _say(self, line: bytes) -> None:
        assert self._process and self._process.stdin
        while line:
            line = line[self._process.stdin.write(line) :]

    def _hear(self) -> bytes:
        """A line and no byte more (the pipe has no buffer), so that `select` sees the next one."""
        assert self._process and self._process.stdout
        return self._process.stdout.readline()


def main() -> None:
    """Imports, then forks a command for each line on stdin until it ends."""
    die_with_parent()
    name_process("stillhouse-warm")
    tell = os.dup(1)
    os.dup2(2, 1)  # nothing that is imported may talk into the protocol
    for name in PRELOAD:
        with contextlib.suppress(ImportError):  # a stage that needs it says so itself
            importlib.import_module(name)
    warm = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            os.environ["STILLHOUSE_PARENT"] = str(warm)
            die_with_parent()
            if os.getppid() != warm:  # it died before it could be our death, too
                os._exit(1)
            _run(**request)
        os.write(tell, json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.write(tell, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """The fork becomes `python -m module arguments`; never returns."""
    code = 1
    try:
        with Path(log).open("ab") as output, Path(os.devnull).open() as nothing:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.dup2(nothing.fileno(), 0)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  (the fork's, to its end)
        os.environ.clear()
        os.environ.update(environment, STILLHOUSE_PARENT=str(os.getppid()))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:  # noqa: BLE001  (as an interpreter ends: traceback, exit code 1)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
