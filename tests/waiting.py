"""Waiting for what gives no event to wait for: another process's files, sockets and end."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 30, interval: float = 0.02) -> T:
    """Calls `condition` every `interval` seconds and returns its first true value; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds:g} s"
        time.sleep(interval)
    return value
