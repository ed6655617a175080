"""Fork server for stage commands: one process imports torch and transformers once, and forks every command.

Importing them takes 5 to 10 s on two cores, eighteen times in the quickstart. The fork runs the same module as
`python -m` does and ends as it does; nothing it allocates stays. Not used where a CUDA device is: CUDA does not survive
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
# PR_SET_PDEATHSIG follows the thread that started a process: this one lives as long as the interpreter.
STARTER = ThreadPoolExecutor(1, thread_name_prefix="fork-server")


class ForkedCommand:
    """A forked command, with the parts of `subprocess.Popen` that its supervisor needs."""

    def __init__(self, pid: int, server: "ForkServer") -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and (code := self._server.exit_code(self.pid)) is not None:
            self.returncode = code
        return self.returncode


class ForkServer:
    """The fork server of this process, started on first use; it runs one command at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, module: str, arguments: Sequence[str], log: Path, environment: dict[str, str]
    ) -> ForkedCommand | None:
        """Runs the module in a fork; None when another command is running in one, or the server cannot start."""
        if not self._lock.acquire(blocking=False):
            return None
        child = None
        try:
            self._ensure_started(environment)
            request = {"module": module, "arguments": list(arguments), "log": str(log), "environment": environment}
            with contextlib.suppress(BrokenPipeError):  # it died since the last poll
                self._send(json.dumps(request).encode() + b"\n")
            if response := self._receive():  # empty where its imports failed: the command itself will say why
                child = ForkedCommand(json.loads(response)["pid"], self)
        finally:
            if child is None:  # after an interruption, too: a command without a supervisor must not run
                if self._process:
                    self._process.kill()
                    self._process.wait()
                self._lock.release()
        return child

    def exit_code(self, pid: int) -> int | None:
        """The exit code of the fork, once; SIGKILL's when the fork server died. None while the fork runs."""
        assert self._process and self._process.stdout
        if not select.select([self._process.stdout], [], [], 0)[0]:
            return None
        response = self._receive()
        if not response:  # the fork got SIGTERM with its parent's death, but the next try needs its directory now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._lock.release()
        return int(json.loads(response)["code"]) if response else -signal.SIGKILL

    def _ensure_started(self, environment: dict[str, str]) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = STARTER.submit(
                subprocess.Popen,
                [sys.executable, "-m", "tasks.core.fork_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, env=environment, bufsize=0,
            ).result()  # fmt: skip

    def _send(self, line: bytes) -> None:
        assert self._process and self._process.stdin
        while line:
            line = line[self._process.stdin.write(line) :]

    def _receive(self) -> bytes:
        """One line, read unbuffered so that `select` sees the next one; empty at the end of the pipe."""
        assert self._process and self._process.stdout
        return self._process.stdout.readline()


def main() -> None:
    """Imports the libraries, then forks a command for each line on stdin until it ends."""
    die_with_parent()
    name_process("stillhouse-warm")
    responses = os.dup(1)
    os.dup2(2, 1)  # an import that prints must not write into the protocol
    for name in PRELOAD:
        with contextlib.suppress(ImportError):  # a stage that needs it says so itself
            importlib.import_module(name)
    server_pid = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(responses)
            os.environ["STILLHOUSE_PARENT"] = str(server_pid)
            die_with_parent()
            if os.getppid() != server_pid:  # it died before the kernel was asked
                os._exit(1)
            _run(**request)
        os.write(responses, json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.write(responses, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Runs `python -m module arguments` in the fork and exits with its code; never returns."""
    code = 1
    try:
        with Path(log).open("ab") as output, Path(os.devnull).open() as devnull:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.dup2(devnull.fileno(), 0)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  (open until the fork ends)
        os.environ.clear()
        os.environ.update(environment, STILLHOUSE_PARENT=str(os.getppid()))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001  (as an interpreter ends: traceback, exit code 1)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
