"""GPU slot: a Prefect global concurrency limit that a stage holds while its command runs."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from tasks.core.settings import Settings

LEASE_SECONDS = 60.0  # how long a slot stays in use after its holder was killed


@contextmanager
def gpu_slot(settings: Settings, logger: Any) -> Iterator[None]:
    """Waits for and holds one slot of `STILLHOUSE_GPU_SLOT`, which is made on first use.

    Strict: a limit that is deleted meanwhile is an error, and does not let every run start at once.
    """
    if _all_in_use(settings):
        logger.info(
            "waiting for the slot %s: another run holds it, or one was killed less than %.0f s ago",
            settings.gpu_slot, LEASE_SECONDS,
        )  # fmt: skip
    with concurrency(
        settings.gpu_slot, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
    ):
        yield


def _all_in_use(settings: Settings) -> bool:
    """Whether every slot is in use; makes the limit where there is none."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(settings.gpu_slot)
            return limit.active_slots >= limit.limit
        except ObjectNotFound:
            limit_of_host = GlobalConcurrencyLimitCreate(name=settings.gpu_slot, limit=settings.gpu_slots)
            with suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(limit_of_host)
            return False
