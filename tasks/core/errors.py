"""Typed errors of a stage: exceptions in its command and its task, exit codes between them.

A command raises one of these (or exits with its code); the shell raises it again in the parent, and
`tasks.core.retry` decides by `retriable` alone whether Prefect tries again.
"""


class StageError(Exception):
    """A stage failed. `exit_code` is its command's; `retriable` says whether another try can help."""

    exit_code = 1
    retriable = False


class BadConfig(StageError):
    """A setting is wrong, or settings do not fit each other or the inputs."""

    exit_code = 10


class BadData(StageError):
    """The data cannot be used: unreadable, empty, too few good rows."""

    exit_code = 11


class GateFailed(StageError):
    """The stage ran, and its result does not reach the required quality."""

    exit_code = 12


class OutOfMemory(StageError):
    """The device's memory ran out; the next try is one memory fallback level lower (see `Job.memory_level`)."""

    exit_code = 20
    retriable = True


class Diverged(StageError):
    """Training met NaN, Inf or exploding gradients and could not recover."""

    exit_code = 21


class DeviceLost(StageError):
    """A CUDA error that poisons its process: illegal access, Xid, driver gone."""

    exit_code = 22
    retriable = True


class Preempted(StageError):
    """SIGTERM arrived; the next try continues from the last checkpoint."""

    exit_code = 30
    retriable = True


class Stalled(StageError):
    """The command wrote nothing for too long, or ran past its time limit, and was stopped."""

    exit_code = 31
    retriable = True


class Killed(StageError):
    """The command was ended by a signal it did not handle (SIGKILL by the host's out-of-memory killer, a crash)."""

    exit_code = 32
    retriable = True


class StorageUnavailable(StageError):
    """The object store did not answer, or answered with an error that may pass."""

    exit_code = 40
    retriable = True


class StorageRefused(StageError):
    """The object store refused: wrong credentials, no such bucket, no right to write."""

    exit_code = 41


class Corrupted(StageError):
    """Stored bytes changed: a sha256 does not match."""

    exit_code = 42
    retriable = True


class NoSpace(StageError):
    """The disk is full."""

    exit_code = 43


class Missing(StageError):
    """An artifact, or a file of it, is not in the store."""

    exit_code = 44


BY_EXIT_CODE: dict[int, type[StageError]] = {error.exit_code: error for error in StageError.__subclasses__()}
