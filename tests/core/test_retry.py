"""Which errors Prefect retries."""

import inspect

import pytest
from prefect.states import Failed

from tasks.core.errors import BY_EXIT_CODE, StageError
from tasks.core.retry import TASK_OPTIONS, is_retriable

RETRIABLE = {
    "OutOfMemory", "DeviceLost", "Preempted", "Stalled", "Killed", "StorageUnavailable", "Corrupted",
}  # fmt: skip


@pytest.mark.parametrize("kind", [StageError, *BY_EXIT_CODE.values(), RuntimeError, ValueError])
def test_only_errors_that_another_try_can_mend_are_retried(kind: type[Exception]) -> None:
    retriable = kind.__name__ in RETRIABLE
    assert is_retriable(None, None, Failed(data=kind("what was wrong"))) is retriable


def test_prefect_listens_to_it() -> None:
    """Prefect 3 ignores a condition that is no plain function, and a task without retries has none to decide on."""
    assert inspect.isfunction(TASK_OPTIONS["retry_condition_fn"])
    assert TASK_OPTIONS["retries"] == len(TASK_OPTIONS["retry_delay_seconds"])
