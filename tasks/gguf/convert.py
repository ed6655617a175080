"""A model directory or a 16-bit GGUF to GGUFs of any kind, tensor by tensor, in a child process with little memory.

with converting(model_dir, "stillhouse", job) as conversion:
    plan = conversion.plan(Wanted("Q4_K_M", ...))      # what every tensor becomes, and the file's bytes
    conversion.write(plan, Path("model.gguf"))
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.engine.runtimes.llama_logits import last_words, llama_environment
from tasks.gguf.conversion_plan import Plan, Skeleton, make_plan
from tasks.gguf.hf_directory import stage, stored_type
from tasks.gguf.tensor_types import Wanted


class Conversion:
    """The child's other end."""

    def __init__(self, child: "subprocess.Popen[str]", what: str, stored: str, log: Path, job: Job) -> None:
        self._child, self._what, self._log, self._job = child, what, log, job
        self.skeleton = skeleton_of(self._hear(), stored)
        self.seconds, self.peak_bytes = 0.0, 0

    def write(self, plan: Plan, target: Path) -> None:
        """Writes `target` as planned; `seconds` and `peak_bytes` (the child's memory) are then this file's.

        Raises BadConfig with what was wrong.
        """
        start = time.monotonic()
        self._tell(order_of(plan, target))
        for _ in plan.tensors:
            told = self._hear()
            self._job.progress(told["done"], told["total"], "tensors", plan.wanted.kind)
            self.peak_bytes = told.get("peak_bytes", 0)
        self.seconds = time.monotonic() - start

    def plan(self, wanted: Wanted, texts: dict[str, str] | None = None, imatrix: Path | None = None) -> Plan:
        """What `write` will do; `texts` are metadata to set."""
        return make_plan(self.skeleton, wanted, texts, imatrix)

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._child.stdin
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"error": last_words(self._log)}
        if "error" in told:
            raise BadConfig(f"{self._what} could not be converted: {told['error']}")
        return told


def skeleton_of(told: dict[str, Any], stored: str) -> Skeleton:
    """What the child's first line says of a model whose matrices are stored as `stored`."""
    shapes = {name: tuple(shape) for name, shape, _ in told["tensors"]}
    types = {name: type_ for name, _, type_ in told["tensors"]}
    return Skeleton(told["architecture"], told["layers"], told["heads_per_kv"], told["values"], stored, shapes, types)


def order_of(plan: Plan, target: Path) -> dict[str, Any]:
    """What the child is told to write `target` as planned."""
    return {
        "target": str(target),
        "kind": plan.wanted.kind,
        "quantize": plan.wanted.kind not in FLOATS,
        "types": {tensor.name: tensor.type for tensor in plan.tensors},
        "set": plan.texts,
        "imatrix": str(plan.imatrix) if plan.imatrix else None,
    }


@contextmanager
def converting(model: Path, name: str, job: Job) -> Iterator[Conversion]:
    """`model` is a GGUF file of 16 or 32 bits, or a directory in Hugging Face's layout.

    Raises BadConfig for what llama.cpp's converter does not know.
    """
    if model.is_file():
        first, stored = {"source": str(model)}, "BF16"
    else:
        first, stored = {"model": str(stage(model, job.work / "staged")), "name": name}, stored_type(model)
    log = job.work / "convert.log"
    command, pipe = [sys.executable, "-m", "tasks.gguf.convert_child"], subprocess.PIPE
    environment = {**llama_environment(), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as messages:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, text=True, env=environment)
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(first) + "\n")
        child.stdin.flush()
        yield Conversion(child, str(model), stored, log, job)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        with suppress(BrokenPipeError):  # it died with a line unread
            child.stdin.close()
