"""Two runs on one host: one waits while the other makes the same output."""

import threading
from pathlib import Path

import pytest

from tasks.core import shell


class Logger:
    """A logger whose `waiting` is set when a run says that it waits for another one."""

    def __init__(self) -> None:
        self.waiting = threading.Event()

    def info(self, message: str, *arguments: object) -> None:
        assert "waiting for it" in message
        self.waiting.set()


def test_a_run_waits_only_for_a_run_with_the_same_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, order, logger = tmp_path / "distill.teacher_cache-0123", list[str](), Logger()
    monkeypatch.setattr(shell, "get_run_logger", lambda: logger)

    def second() -> None:
        with shell._output_lock(scratch):
            order.append("second")

    thread = threading.Thread(target=second)
    with shell._output_lock(scratch):
        thread.start()
        assert logger.waiting.wait(10)
        with shell._output_lock(tmp_path / "distill.teacher_cache-4567"):  # another output of the same stage
            order.append("other")
        order.append("first")
    thread.join(10)
    assert order == ["other", "first", "second"]
