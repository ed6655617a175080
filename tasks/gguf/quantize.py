"""llama.cpp's quantizer (cyllama) in a child process, and its dry run: the plan, in llama.cpp's own words.

The dry run decides by the code that will quantize, so what it says of each tensor is what will happen.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.engine.llama import last_words, llama_environment

LINE = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+) +- \[([^]]*)\], type = +(\w+), (.*)")


class Planned(NamedTuple):
    """What will become of a tensor: `shape` with the row length first, types by ggml's names (`Q5_0`)."""

    name: str
    shape: list[int]
    source: str
    target: str

    def fell_back(self, kind: str) -> bool:
        """Whether the row length, no multiple of 256, made llama.cpp take another type than the kind's."""
        blocks_of_256 = "_K" in kind or kind == "IQ4_XS"
        return blocks_of_256 and self.source != self.target and self.shape[0] % 256 != 0


def plan(source: Path, kind: str, job: Job) -> list[Planned]:
    """Which type each tensor of `source` becomes when quantized to `kind`; nothing is written."""
    planned = []
    for match in _run(source, job.work / "dry_run.gguf", kind, True, job.work / "plan.log"):
        shape = [int(size) for size in match[4].split(",")]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        target = re.search(r"\((\w+)\)\s*$", match[6])
        becomes = target[1] if target else match[5]
        planned.append(Planned(match[3], shape, match[5].upper(), becomes.upper()))
    return planned


def quantize(source: Path, target: Path, kind: str, job: Job) -> None:
    """Writes `target`; raises BadConfig with llama.cpp's last words when it cannot."""
    for match in _run(source, target, kind, False, job.work / "quantize.log"):
        job.progress(int(match[1]), int(match[2]), "tensors", kind)


def sentence(planned: list[Planned], kind: str) -> str:
    """The plan as a person reads it."""
    counts: dict[str, int] = {}
    for tensor in planned:
        counts[tensor.target] = counts.get(tensor.target, 0) + 1
    fallen = [tensor for tensor in planned if tensor.fell_back(kind)]
    types = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    if not fallen:
        return f"{kind}: {types}; no tensor falls back"
    rows = ", ".join(map(str, sorted({tensor.shape[0] for tensor in fallen})))
    return f"{kind}: {types}; {len(fallen)} tensors fall back: their rows ({rows} values) are no multiple of 256"


def _run(source: Path, target: Path, kind: str, dry: bool, log: Path) -> Iterator[re.Match[str]]:
    command = [sys.executable, "-m", "tasks.gguf.quantize", str(source), str(target), kind, "dry" if dry else "write"]
    with (
        log.open("w") as messages,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=llama_environment(),
        ) as child,
    ):
        assert child.stdout
        try:
            for line in child.stdout:
                messages.write(line)
                if match := LINE.match(line):
                    yield match
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise BadConfig(f"llama.cpp could not quantize {source.name} to {kind}: {last_words(log)}")


def _quantize_here(source: str, target: str, kind: str, dry: bool) -> None:
    import gguf  # noqa: PLC0415 - only the child needs it
    from cyllama.llama import llama_cpp as llama  # noqa: PLC0415 - only the child may load llama.cpp

    params = llama.LlamaModelQuantizeParams()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    params.dry_run = dry
    llama.model_quantize(source, target, params)


if __name__ == "__main__":
    _quantize_here(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "dry")
