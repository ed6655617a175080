"""The whole pipeline in a subprocess, as a user starts it, on the quickstart's bases and a few of its rows."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tests.mlflow_database import put_empty_database
from tests.prefect_server import PrefectServer

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deployments" / "quickstart"
TRAINING = {"max_steps": 4, "batch_size": 8, "micro_batch_size": 8, "rank": 4, "save_every_steps": 1}


def settings(directory: Path, **changes: Any) -> dict[str, Any]:
    """A config that takes every stage in seconds: 120 rows, 4 steps, 12 rows to evaluate."""
    for split, rows in (("train", 120), ("test", 12)):
        with (QUICKSTART / "data" / f"{split}.jsonl").open() as source:
            (directory / f"{split}.jsonl").write_text("".join(islice(source, rows)))
    return {
        "train": str(directory / "train.jsonl"),
        "test": str(directory / "test.jsonl"),
        "teacher_base": str(QUICKSTART / "teacher"),
        "student_base": str(QUICKSTART / "student"),
        "teacher": TRAINING,
        "student": {**TRAINING, "method": "lora"},
        "outliers": {"calibration_rows": 8, "measured_rows": 4},
        "merge": {"gate_rows": 4},
        "gguf": [{"kind": "Q8_0", "proof_rows": 4, "min_top1": 0.8}],
        "evaluate": {"max_new_tokens": 16, "latency_rows": 2, "perplexity_rows": 4},
        "gate": {"student_points": None, "gguf_points": None, "gain_points": None, "floors": {"json_valid": 0}},
        **changes,
    }


class Home:
    """A `STILLHOUSE_HOME` of its own and the config that runs in it."""

    def __init__(self, directory: Path, server: PrefectServer, flow: str = "pipeline", **changes: Any) -> None:
        self.directory, self.config, self.flow = directory, directory / "run.yaml", flow
        self._log = directory / "output.txt"
        self.environment = {
            **os.environ, **server.environment, "STILLHOUSE_HOME": str(directory / "home"),
            "STILLHOUSE_GPU_SLOT": f"gpu-{directory.name}",
        }  # fmt: skip
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        put_empty_database(directory / "home")
        self.write(**changes)

    def write(self, **changes: Any) -> None:
        """The pipeline's config anew, with changes; another flow's is `changes` alone."""
        whole = settings(self.directory, **changes)
        self.config.write_text(yaml.safe_dump(whole if self.flow == "pipeline" else changes))

    def start(self) -> "subprocess.Popen[bytes]":
        """The command, running, in a process group of its own; what it says is in `output`."""
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"flows.{self.flow}", str(self.config)], cwd=ROOT, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What the last command has said so far."""
        return self._log.read_text()

    def run(self) -> str:
        """The command's output; its failure is an AssertionError with that output."""
        assert self.start().wait(timeout=900) == 0, self.output[-6000:]
        return self.output

    def fail(self) -> str:
        """The output of a run that has to fail."""
        assert self.start().wait(timeout=300) != 0, self.output[-3000:]
        return self.output

    @property
    def summary(self) -> dict[str, Any]:
        """The last run's `summary.json`."""
        return json.loads((self.directory / "home" / "reports" / "latest" / "summary.json").read_text())

    @property
    def cached(self) -> dict[str, bool]:
        """Whether each stage of the last run came from the cache."""
        return {stage["name"]: stage["cached"] for stage in self.summary["stages"]}
