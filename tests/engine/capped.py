"""The teacher's command with a lid on its memory: it runs out of it as it would on a smaller machine or card.

    CAP_MIB=300 python -m tests.engine.capped config.json --base DIR --dataset DIR --out DIR

On a CUDA device the lid is torch's share of the card. On the CPU it is RLIMIT_AS, so much above what the process has
when its model stands and training begins.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune

CAP = int(os.environ.get("CAP_MIB", "0")) * 2**20


class CappedJob(Job):
    """Closes the lid when the training loop begins."""

    @contextmanager
    def defer_stop(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CAP, resource.RLIM_INFINITY))
        with super().defer_stop():
            yield
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def capped(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """`fine_tune` under the lid."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.mem_get_info()[1])
    job.__class__ = CappedJob
    return fine_tune(config, base, dataset, out, job)


if __name__ == "__main__":
    command(capped)
