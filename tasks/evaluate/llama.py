"""Greedy answers from llama.cpp's server: prompts go in as token ids, all slots work at the same time.

The server runs in a child process, because llama.cpp is loud and ends its process on what it does not like.
"""

import json
import math
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.core.errors import BadData, GateFailed
from tasks.core.job import Job
from tasks.engine.llama import last_words, llama_environment
from tasks.evaluate.asked import Answered, Asked, cut

ROUNDS = 4
"""Requests hold so many rows a slot: enough to keep slots busy, few enough to show progress."""


class LlamaServer:
    """The running server: `complete` posts to llama.cpp's native route."""

    def __init__(self, url: str, key: str, log: Path) -> None:
        self.url, self.key, self.log = url, key, log
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def complete(self, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
        """A result a prompt, in order. Raises GateFailed when the server refuses or dies."""
        body = json.dumps({"prompt": prompts, **options}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            with self._opener.open(urllib.request.Request(self.url + "/completion", body, headers)) as response:
                found = json.load(response)
        except (urllib.error.URLError, ConnectionError) as error:
            said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else last_words(self.log)
            raise GateFailed(f"llama.cpp did not answer ({error}): {said}") from error
        results = found if isinstance(found, list) else [found]
        return sorted(results, key=lambda result: int(result["index"]))


@contextmanager
def llama_server(gguf: Path, slots: int, context: int, threads: int, log: Path) -> Iterator[LlamaServer]:
    """A server for `gguf` with `slots` of `context` tokens each, on a free port of this host behind a random key."""
    key = secrets.token_hex(16)
    settings = {"gguf": str(gguf), "slots": slots, "context": context, "threads": threads, "key": key}
    command = [sys.executable, "-m", "tasks.evaluate.llama"]
    with log.open("a") as messages:
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, env=llama_environment())
    assert child.stdin and child.stdout
    try:
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()
        url = child.stdout.readline().decode().strip()
        if not url:
            raise GateFailed(f"llama.cpp could not load {gguf}: {last_words(log)}")
        yield LlamaServer(url, key, log)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def answer_llama(gguf: Path, asked: Asked, job: Job) -> Answered:
    """Answers all prompts; raises GateFailed when a warm-up row's probabilities are not finite."""
    if not gguf.is_file():
        raise BadData(f"{gguf} is not there: give the output directory of the gguf stage")
    slots = min(asked.batch_size, len(asked.prompts))
    context = max(map(len, asked.prompts)) + asked.max_new_tokens
    options = {
        "n_predict": asked.max_new_tokens,
        "temperature": 0,
        "samplers": ["temperature"],
        "return_tokens": True,
        "cache_prompt": False,
    }
    fields = ["index", "tokens", "tokens_predicted"]
    answers: list[list[int]] = []
    generated = 0
    with llama_server(gguf, slots, context, asked.threads, job.work / "llama.log") as server:
        if asked.warmup_rows:
            _assert_finite(asked.rows, server.complete(asked.prompts[: asked.warmup_rows], **options, n_probs=1))
        start = time.perf_counter()
        for first in range(0, len(asked.prompts), ROUNDS * slots):
            prompts = asked.prompts[first : first + ROUNDS * slots]
            for result in server.complete(prompts, **options, response_fields=fields):
                answers.append(cut(result["tokens"], asked.ends))
                generated += int(result["tokens_predicted"])
            rate = generated / (time.perf_counter() - start)
            job.progress(len(answers), len(asked.prompts), "rows", f"{rate:.0f} tokens/s")
        return Answered(answers, generated, time.perf_counter() - start)


def _assert_finite(rows: list[int], results: list[dict[str, Any]]) -> None:
    """llama.cpp writes a NaN as null. Only warm-up rows ask for probabilities: they cost a sort of the vocabulary."""
    for row, result in zip(rows, results, strict=False):
        for token in result.get("completion_probabilities", []):
            if token["logprob"] is None or not math.isfinite(token["logprob"]):
                raise GateFailed(f"row {row} of the test file: llama.cpp's logits are not finite. The GGUF is broken")


def _serve() -> None:
    """The child: settings as a JSON line on stdin, the server's URL on stdout; it lives until stdin closes."""
    import os  # noqa: PLC0415

    import xllamacpp  # noqa: PLC0415  (the parent must not load llama.cpp)

    url = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints goes to the log
    settings = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.api_keys = [settings["key"]]
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["slots"] * settings["context"]
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = settings["threads"]
    params.n_ctx_checkpoints = params.cache_ram_mib = 0  # prompts are seen once: nothing to keep
    params.fit_params = params.warmup = params.ui = params.endpoint_slots = False
    server = xllamacpp.Server(params)
    url.write(server.listening_address + "\n")
    url.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
