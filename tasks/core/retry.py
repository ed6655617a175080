"""Retry policy of every task: typed errors that another try can mend are retried, and no others."""

from typing import Any

from prefect.cache_policies import NO_CACHE

from tasks.core.errors import StageError


def is_retriable(task: Any, task_run: Any, state: Any) -> bool:
    """Whether Prefect retries a failed task, as its `retry_condition_fn`.

    Storage, network, a killed or preempted command and out-of-memory (a memory fallback level on) are retried; bad
    config, bad data and a failed gate are not, nor is an unforeseen error. A plain function: Prefect 3 ignores callable
    objects.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.retriable


# Options of every `@task`. Prefect's own cache is off: the store's index takes its place, so that a worker finds the
# outputs of every other worker with the same store.
TASK_OPTIONS: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [2.0, 10.0, 60.0],
    "retry_condition_fn": is_retriable,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
