"""Ties a child process's life to its parent's, and names it in `ps`. Linux only; elsewhere nothing happens."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def die_with_parent() -> None:
    """Asks the kernel for SIGTERM when the parent (`STILLHOUSE_PARENT`) dies, so that no orphan keeps a GPU."""
    if os.environ.get("STILLHOUSE_PARENT") == str(os.getppid()):
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def name_process(name: str) -> None:
    """Sets this process's name in `ps`, `top` and `htop`, cut to 15 characters."""
    _prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, value: object) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
