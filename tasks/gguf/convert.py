"""Converts a model directory or a 16-bit GGUF to GGUFs of any kind, tensor by tensor, in a child process.

with open_conversion(model_dir, "stillhouse", job) as conversion:
    plan = make_plan(conversion.layout, conversion.layout.options("Q4_K_M"))
    conversion.write(plan, Path("model.gguf"))
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.engine.runtimes.llama_logits import llama_environment, log_tail
from tasks.gguf.conversion_plan import ConversionPlan, ModelLayout
from tasks.gguf.staging import stage_for_converter, stored_type


class Conversion:
    """A running child process (tasks.gguf.convert_child) that has read a model, and the model's layout."""

    text_tokens: Sequence[int] = ()
    """Ids of special tokens that are text in a text (`tasks.engine.data.literal_tokens`)."""

    def __init__(self, child: "subprocess.Popen[str]", model: str, stored: str, log: Path, job: Job) -> None:
        self._child, self._model, self._log, self._job = child, model, log, job
        self.layout = parse_layout(self._receive(), stored)
        self.seconds, self.peak_bytes = 0.0, 0

    def write(self, plan: ConversionPlan, target: Path) -> None:
        """Writes `target` as planned, and sets `seconds` and `peak_bytes` (the child's memory) of this file.

        Raises BadConfig with the child's error.
        """
        start = time.monotonic()
        self._send(write_request(plan, target) | {"text_tokens": list(self.text_tokens)})
        for _ in plan.tensors:
            message = self._receive()
            self._job.progress(message["done"], message["total"], "tensors", plan.kind)
            self.peak_bytes = message.get("peak_bytes", 0)
        self.seconds = time.monotonic() - start

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child.stdin
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line else {"error": log_tail(self._log)}
        if "error" in message:
            raise BadConfig(f"{self._model} could not be converted: {message['error']}")
        return message


def parse_layout(message: dict[str, Any], stored: str) -> ModelLayout:
    """The model's layout from the child's first line; `stored` is the type of the model's own matrices."""
    shapes = {name: tuple(shape) for name, shape, _ in message["tensors"]}
    types = {name: type_ for name, _, type_ in message["tensors"]}
    architecture, layers, heads_per_kv = (message[key] for key in ("architecture", "layers", "heads_per_kv"))
    return ModelLayout(architecture, layers, heads_per_kv, message["values"], stored, shapes, types)


def write_request(plan: ConversionPlan, target: Path) -> dict[str, Any]:
    """The request to the child to write `target` as planned."""
    return {
        "target": str(target),
        "kind": plan.kind,
        "quantize": plan.kind not in FLOATS,
        "types": {tensor.name: tensor.type for tensor in plan.tensors},
        "set": plan.texts,
        "imatrix": str(plan.imatrix) if plan.imatrix else None,
    }


@contextmanager
def open_conversion(model: Path, name: str, job: Job) -> Iterator[Conversion]:
    """Starts the child on `model`, a GGUF file of 16 or 32 bits or a directory in Hugging Face's layout.

    Raises BadConfig for a model that llama.cpp's converter does not know.
    """
    if model.is_file():
        request, stored = {"source": str(model)}, "BF16"
    else:
        request, stored = (
            {"model": str(stage_for_converter(model, job.work / "staged")), "name": name},
            stored_type(model),
        )
    log = job.work / "convert.log"
    command, pipe = [sys.executable, "-m", "tasks.gguf.convert_child"], subprocess.PIPE
    environment = {**llama_environment(), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as messages:
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, text=True, env=environment)
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        yield Conversion(child, str(model), stored, log, job)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        with suppress(BrokenPipeError):  # it died with a line unread
            child.stdin.close()
