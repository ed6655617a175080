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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.errors import BadData, GateFailed
from tasks.core.job import Job
from tasks.engine.llama import LlamaInput, last_words, llama_environment, llama_logits
from tasks.evaluate.asked import Answered, Asked, Latency, Loss, Schema, Text, cut
from tasks.evaluate.parameters import gguf_statistics

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


class LlamaEngine:
    """A `tasks.evaluate.asked.Engine` on a GGUF file in a running server."""

    def __init__(self, gguf: Path, server: LlamaServer, asked: Asked, slots: int, job: Job) -> None:
        self.gguf, self.server, self.asked, self.slots, self.job = gguf, server, asked, slots, job

    def answer(self, places: Sequence[int], schema: Schema | None = None) -> Answered:
        """All prompts, as many at a time as there are slots."""
        answers: list[list[int]] = []
        generated, start = 0, time.perf_counter()
        held = {"json_schema": schema} if schema is not None else {}
        for first in range(0, len(places), ROUNDS * self.slots):
            asked = places[first : first + ROUNDS * self.slots]
            for place, result in zip(asked, self._complete(asked, **held), strict=True):
                self._assert_finite(place, result)
                answers.append(cut(result["tokens"], self.asked))
                generated += int(result["tokens_predicted"])
            rate = generated / (time.perf_counter() - start)
            self.job.progress(len(answers), len(places), "rows", f"{rate:.0f} tokens/s")
        return Answered(answers, generated, time.perf_counter() - start)

    def alone(self, place: int) -> Latency:
        """One prompt in one slot; llama.cpp's own clock says when its first token was there."""
        start = time.perf_counter()
        [result] = self._complete([place])
        total = time.perf_counter() - start
        return Latency(result["timings"]["prompt_ms"] / 1000, total, int(result["tokens_predicted"]))

    def loss(self, texts: Sequence[Text]) -> Loss:
        """Cross-entropy of the texts from all of llama.cpp's logits, one text after the other."""
        nats, tokens = 0.0, 0
        inputs = [LlamaInput("", text.input_ids, text.start) for text in texts]
        for text, output in zip(texts, llama_logits(self.gguf, inputs, self.job.work / "llama.log"), strict=True):
            logits = output.logits.astype(np.float64)
            labels = text.input_ids[text.start :]
            top = logits.max(axis=1)
            norms = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            nats += float((norms - logits[range(len(labels)), labels]).sum())
            tokens += len(labels)
        if not math.isfinite(nats):
            raise GateFailed("llama.cpp's loss on the held-out answers is NaN or infinite: the GGUF is broken")
        return Loss(nats, tokens)

    def parameters(self) -> dict[str, Any]:
        """Statistics of the file's tensors."""
        return gguf_statistics(self.gguf)

    def _complete(self, places: Sequence[int], **options: Any) -> list[dict[str, Any]]:
        """Greedy completions. Two candidates are kept before a probability is asked for: that costs no sort.

        One would do for the answer, but llama.cpp gives a single candidate probability 1 whatever its logit.
        """
        prompts = [self.asked.prompts[place] for place in places]
        greedy = {"samplers": ["top_k", "temperature"], "top_k": 2, "temperature": 0}
        checked = {"n_probs": 1, "post_sampling_probs": True}
        fields = ["index", "tokens", "tokens_predicted", "timings", "completion_probabilities"]
        return self.server.complete(
            prompts, n_predict=self.asked.max_new_tokens, return_tokens=True, cache_prompt=False,
            response_fields=fields, **greedy, **checked, **options,
        )  # fmt: skip

    def _assert_finite(self, place: int, result: dict[str, Any]) -> None:
        """A candidate whose logit is NaN or infinite has no probability; llama.cpp writes it as null."""
        for token in result.get("completion_probabilities", []):
            if token["prob"] is None or not math.isfinite(token["prob"]):
                row = self.asked.rows[place]
                raise GateFailed(f"row {row} of the test file: llama.cpp's logits are not finite. The GGUF is broken")


@contextmanager
def llama_engine(gguf: Path, asked: Asked, job: Job) -> Iterator[LlamaEngine]:
    """The file in a server, with a slot for every row that is answered at the same time."""
    if not gguf.is_file():
        raise BadData(f"{gguf} is not there: give the output directory of the gguf stage")
    slots = max(1, min(asked.batch_size >> job.rung, len(asked.prompts)))
    context = max(map(len, asked.prompts)) + asked.max_new_tokens
    with llama_server(gguf, slots, context, asked.threads, job.work / "llama.log") as server:
        yield LlamaEngine(gguf, server, asked, slots, job)


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
