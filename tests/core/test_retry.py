"""Which errors are tried again, as Prefect asks."""

import inspect

import pytest
from prefect.states import Failed

from tasks.core.errors import BY_EXIT_CODE, StageError
from tasks.core.retry import TASK, can_be_mended

MENDED_BY_ANOTHER_TRY = {
    "OutOfMemory", "DeviceLost", "Preempted", "Stalled", "Killed", "StorageUnavailable", "Corrupted",
}  # fmt: skip


@pytest.mark.parametrize("kind", [StageError, *BY_EXIT_CODE.values(), RuntimeError, ValueError])
def test_only_what_another_try_can_mend_is_tried_again(kind: type[Exception]) -> None:
    wanted = kind.__name__ in MENDED_BY_ANOTHER_TRY
    assert can_be_mended(None, None, Failed(data=kind("what was wrong"))) is wanted


def test_prefect_listens_to_it() -> None:
    """Prefect 3 ignores a condition that is no plain function, and a task without retries has none to decide on."""
    assert inspect.isfunction(TASK["retry_condition_fn"]) and TASK["retries"] == len(TASK["retry_delay_seconds"])
