"""What a child process owes its parent: to die with it, and to be told apart in `ps`. Linux only; elsewhere nothing."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def die_with_parent() -> None:
    """SIGTERM for us when the process that started us (`STILLHOUSE_PARENT`) dies: no orphan keeps a GPU."""
    if os.environ.get("STILLHOUSE_PARENT") == str(os.getppid()):
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def name_process(name: str) -> None:
    """The name in `ps`, `top` and `htop`, cut to 15 letters."""
    _prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, value: object) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
