"""Which failures are tried again: those that another try can mend, and no others."""

from typing import Any

from prefect.cache_policies import NO_CACHE

from tasks.core.errors import StageError


def can_be_mended(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`. A plain function: Prefect 3 ignores callable objects and partials.

    Storage, network, a killed or preempted command and out-of-memory (one rung lower) are tried again; bad config,
    bad data and a failed gate are not, nor is an error that nobody foresaw.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.retriable


# What every `@task` here takes. Prefect's own cache is off: the store's index is asked instead, so that any worker
# with access to the store finds what any other made.
TASK: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [2.0, 10.0, 60.0],
    "retry_condition_fn": can_be_mended,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
