"""A stage that fails in the way that its config names, for the tests of the supervisor."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pydantic import BaseModel

from tasks.core.command import Report, command
from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tests.waiting import wait_until

INITIAL_ENVIRONMENT = dict(os.environ)


class ProbeConfig(BaseModel):
    """`act` names what the stage does."""

    act: str = "succeed"


def probe(
    config: ProbeConfig, out: Path, job: Job, data: Path | None = None, models: dict[str, ModelDir] | None = None
) -> Report:
    """Succeeds, fails, hangs or ignores signals, by `config.act`."""
    job.log(f"pid {os.getpid()}")
    job.progress(1, 2, "steps", "half way")
    job.metrics(1, loss=0.5)
    match config.act:
        case "succeed":
            (out / "result.txt").write_text("result")
        case "environment":
            (job.work / "environment.json").write_text(json.dumps(INITIAL_ENVIRONMENT))
        case "gate":
            raise GateFailed("exact match 0.81 is below 0.90")
        case "value":
            raise ValueError("learning_rate is -1; set it above 0")
        case "crash":
            raise RuntimeError("nobody foresaw this")
        case "memory":
            raise MemoryError("CUDA out of memory")
        case "disk":
            with Path("/dev/full").open("w") as full:
                full.write("x" * 10_000)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(60)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            grandchild = subprocess.Popen(
                [sys.executable, "-c", "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"]
            )  # noqa: E501
            job.log(f"grandchild {grandchild.pid}")
            time.sleep(60)
        case "checkpoint":
            with job.defer_stop():
                job.log("training")
                wait_until(lambda: job.stop_requested)
                (job.work / "checkpoint").write_text("saved")
    facts = {"memory_level": job.memory_level, "data": str(data), "adapter": str(models and models["m"].adapter)}
    return Report(facts=facts, metrics={"loss": 0.5})


if __name__ == "__main__":
    command(probe)
