"""llama.cpp's logits from a child process, because llama.cpp aborts on errors and prints to the terminal.

for row in llama_logits(Path("model.gguf"), rows, log=Path("llama.log")):
    row.ids, row.logits     # llama.cpp's own token ids of the text; [answer tokens, vocabulary]
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import GateFailed


class LlamaInput(NamedTuple):
    """A conversation as text and as the reference's token ids; logits are returned from the token before `start`."""

    text: str
    input_ids: list[int]
    start: int


class LlamaOutput(NamedTuple):
    """llama.cpp's ids of the text, and its logits [len(input_ids) - start, vocabulary] for the reference's ids."""

    ids: list[int]
    logits: NDArray[np.float32]


def llama_logits(gguf: Path, rows: list[LlamaInput], log: Path) -> Iterator[LlamaOutput]:
    """Loads `gguf` once and yields each row's logits; messages go to `log`. Raises GateFailed if llama.cpp crashes."""
    command = [sys.executable, "-m", "tasks.engine.runtimes.llama_logits", str(gguf)]
    with log.open("a") as messages:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, env=llama_environment()
        )
        assert child.stdin and child.stdout
        try:
            child.stdin.write(json.dumps([row._asdict() for row in rows]).encode())
            child.stdin.close()
            for _ in rows:
                yield _read_output(child.stdout, gguf, log)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def llama_environment() -> dict[str, str]:
    """Environment of a child that runs llama.cpp: this checkout on the Python path, no debugger when it aborts."""
    root = str(Path(__file__).parents[3])
    return {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": os.pathsep.join([root, *_python_path()])}


def log_tail(log: Path, lines: int = 4) -> str:
    """The last lines of a log, joined."""
    return " | ".join([line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-lines:])


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _read_output(stdout: IO[bytes], gguf: Path, log: Path) -> LlamaOutput:
    line = stdout.readline()
    head = json.loads(line) if line.endswith(b"\n") else {}
    size = 4 * head.get("rows", 0) * head.get("vocabulary", 0)
    data = stdout.read(size)
    if not head or len(data) < size:
        raise GateFailed(f"llama.cpp could not run {gguf.name}: {log_tail(log)}")
    return LlamaOutput(head["ids"], np.frombuffer(data, np.float32).reshape(head["rows"], head["vocabulary"]))


def _serve(gguf: str) -> None:
    """The child: rows as JSON on stdin, for each a JSON line and raw float32 logits on stdout."""
    from cyllama.llama import llama_cpp as llama  # noqa: PLC0415 - the parent must not load llama.cpp

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what llama.cpp prints goes to the log
    rows = [LlamaInput(**row) for row in json.load(sys.stdin)]
    llama.ggml_backend_load_all()

    class Model(llama.LlamaModel):  # type: ignore[misc]
        """cyllama 0.2.18's get_logits_ith asks the model for `n_vocab`, which only its vocabulary has."""

        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    model = Model(gguf, llama.LlamaModelParams())
    longest = max(len(row.input_ids) for row in rows)
    context = llama.LlamaContext(model, _context_params(llama, longest))
    vocabulary = model.get_vocab()
    batch = llama.LlamaBatch(n_tokens=longest, embd=0, n_seq_max=1)
    for row in rows:
        context.kv_cache_clear()
        batch.clear()
        positions = range(row.start - 1, len(row.input_ids) - 1)
        for i, token in enumerate(row.input_ids):
            batch.add(token, i, [0], i in positions)
        context.decode(batch)
        ids = vocabulary.tokenize(row.text, False, True)
        head = {"ids": list(ids), "rows": len(positions), "vocabulary": model.n_vocab}
        answers.write(json.dumps(head).encode() + b"\n")
        for i in positions:
            answers.write(np.asarray(context.get_logits_ith(i), np.float32).tobytes())
        answers.flush()


def _context_params(llama: Any, longest: int) -> Any:
    params = llama.LlamaContextParams()
    params.n_ctx = params.n_batch = -(-longest // 256) * 256
    params.n_ubatch = min(512, params.n_batch)
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    return params


if __name__ == "__main__":
    _serve(sys.argv[1])
