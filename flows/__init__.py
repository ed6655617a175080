"""Orders of the same tasks. Importing this package loads no torch."""

import os

# A slot held by a run that was killed comes free by its lease, even if the server was killed with it.
os.environ.setdefault("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "prefect.server.concurrency.lease_storage.filesystem")
# Prefect's temporary server takes about 12 s to start on two idle cores, and more on busy ones; its default is 20.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
