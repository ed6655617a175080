"""Two runs on one host: who waits for whom."""

import threading
from pathlib import Path

from prefect.logging import disable_run_logger

from tasks.core.shell import _alone


def test_a_run_waits_for_who_makes_the_same_and_for_nobody_else(tmp_path: Path) -> None:
    ours, order = tmp_path / "distill.teacher_cache-0123", list[str]()
    inside = threading.Event()

    def second() -> None:
        with disable_run_logger():
            inside.set()
            with _alone(ours):
                order.append("second")

    waiting = threading.Thread(target=second)
    with _alone(ours):
        waiting.start()
        inside.wait(10)
        with _alone(tmp_path / "distill.teacher_cache-4567"):  # another output of the same stage
            order.append("other")
        waiting.join(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["other", "first", "second"]
