"""GPU slot: a Prefect global concurrency limit that a stage holds while its command runs.

Without a Prefect server (no `PREFECT_API_URL`) it is a lock file below `home`: the temporary server that Prefect starts
then does not run the service that frees the slots of killed runs, so that a slot would never come back.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings

from tasks.core.settings import Settings

LEASE_SECONDS = 60.0  # how long a slot stays in use after its holder was killed
POLL_SECONDS = 0.5  # between looks at lock files that others hold


@contextmanager
def gpu_slot(settings: Settings, logger: Any) -> Iterator[None]:
    """Waits for and holds one slot of `STILLHOUSE_GPU_SLOT`, which is made on first use.

    Strict: a limit that is deleted meanwhile is an error, and does not let every run start at once.
    """
    if get_current_settings().api.url is None:
        with _locked_file(settings, logger):
            yield
        return
    if _all_in_use(settings):
        logger.info(
            "waiting for the slot %s: another run holds it, or one was killed less than %.0f s ago",
            settings.gpu_slot, LEASE_SECONDS,
        )  # fmt: skip
    with concurrency(
        settings.gpu_slot, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
    ):
        yield


@contextmanager
def _locked_file(settings: Settings, logger: Any) -> Iterator[None]:
    """Holds the lock of one of `<home>/slots/<name>-<number>`; the kernel frees it when the holder dies."""
    directory = settings.root / "slots"
    directory.mkdir(exist_ok=True)
    files = [(directory / f"{settings.gpu_slot}-{number}").open("w") for number in range(settings.gpu_slots)]
    try:
        if not any(map(_try_lock, files)):
            logger.info("waiting for the slot %s: another run of this machine holds it", settings.gpu_slot)
            while not any(map(_try_lock, files)):
                time.sleep(POLL_SECONDS)
        yield
    finally:
        for file in files:
            file.close()


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
