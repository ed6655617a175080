"""Greedy answers from llama.cpp's server: prompts go in as token ids, all slots work at the same time."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.core.errors import BadData, GateFailed
from tasks.core.job import Job
from tasks.engine.runtimes.llama_logits import LlamaInput, llama_logits
from tasks.engine.runtimes.llama_server import Server, llama_server
from tasks.evaluate.generation import Generation, GenerationRequest, Latency, Loss, Schema, Text, is_cut, truncate
from tasks.evaluate.parameters import gguf_statistics

ROUNDS = 4
"""Rows a slot in one request to the server: enough to keep slots busy, few enough to show progress."""


class LlamaEngine:
    """A `tasks.evaluate.generation.Engine` on a GGUF file in a running server."""

    def __init__(self, gguf: Path, server: Server, request: GenerationRequest, slots: int, job: Job) -> None:
        self.gguf, self.server, self.request = gguf, server, request
        self.slots, self.job = slots, job

    def generate(self, indices: Sequence[int], schema: Schema | None = None) -> Generation:
        """Answers all prompts, as many at a time as there are slots."""
        answers: list[list[int]] = []
        cut: list[bool] = []
        tokens, start = 0, time.perf_counter()
        options = {"json_schema": schema} if schema is not None else {}
        for first in range(0, len(indices), ROUNDS * self.slots):
            group = indices[first : first + ROUNDS * self.slots]
            for index, result in zip(group, self._complete(group, **options), strict=True):
                self._assert_finite(index, result)
                answers.append(truncate(result["tokens"], self.request))
                cut.append(is_cut(result["tokens"], self.request))
                tokens += int(result["tokens_predicted"])
            rate = tokens / (time.perf_counter() - start)
            self.job.progress(len(answers), len(indices), "rows", f"{rate:.0f} tokens/s")
        return Generation(answers, tokens, time.perf_counter() - start, cut)

    def time_single(self, index: int) -> Latency:
        """Answers one prompt in one slot; the first token's time is by llama.cpp's own clock."""
        start = time.perf_counter()
        [result] = self._complete([index])
        total = time.perf_counter() - start
        return Latency(result["timings"]["prompt_ms"] / 1000, total, int(result["tokens_predicted"]))

    def loss(self, texts: Sequence[Text]) -> Loss:
        """Cross-entropy of the texts, summed, from llama.cpp's logits at every position, one text at a time."""
        nats, tokens = 0.0, 0
        inputs = [LlamaInput("", text.input_ids, text.start) for text in texts]
        for text, output in zip(texts, llama_logits(self.gguf, inputs, self.job.work / "llama.log"), strict=True):
            labels = text.input_ids[text.start :]
            nats += sum(_nats(row, label) for row, label in zip(output.logits, labels, strict=True))
            tokens += len(labels)
        if not math.isfinite(nats):
            raise GateFailed("llama.cpp's loss is NaN or infinite: the GGUF is broken")
        return Loss(nats, tokens)

    def parameters(self) -> dict[str, Any]:
        """Statistics of the file's tensors."""
        return gguf_statistics(self.gguf)

    def _complete(self, indices: Sequence[int], **options: Any) -> list[dict[str, Any]]:
        """Greedy completions, with the probability of each token among the two best candidates, which costs no sort.

        One candidate would do for the answer, but llama.cpp gives it probability 1 whatever its logit.
        """
        request = self.request.constrained() if "json_schema" in options else self.request
        prompts = [request.prompts[index] for index in indices]
        greedy = {"samplers": ["top_k", "temperature"], "top_k": 2, "temperature": 0}
        probabilities = {"n_probs": 1, "post_sampling_probs": True}
        fields = ["index", "tokens", "tokens_predicted", "timings", "completion_probabilities"]
        results = self.server.post(
            "/completion", prompt=prompts, n_predict=self.request.max_new_tokens, return_tokens=True,
            cache_prompt=False, response_fields=fields, **greedy, **probabilities, **options,
        )  # fmt: skip
        return sorted(results if isinstance(results, list) else [results], key=lambda result: int(result["index"]))

    def _assert_finite(self, index: int, result: dict[str, Any]) -> None:
        """A candidate whose logit is NaN or infinite has no probability; llama.cpp writes it as null."""
        for token in result.get("completion_probabilities", []):
            if token["prob"] is None or not math.isfinite(token["prob"]):
                row = self.request.row_numbers[index]
                raise GateFailed(f"row {row} of the test file: llama.cpp's logits are not finite. The GGUF is broken")


def _nats(logits: NDArray[np.float32], label: int) -> float:
    """Cross-entropy of one token, log(sum(exp(logits))) - logits[label], in float64.

    One position at a time, for the logits of a window with a large vocabulary are 270 MB already.
    """
    top = logits.max()
    return float(np.log(np.exp(logits - top, dtype=np.float64).sum()) + top - logits[label])


@contextmanager
def llama_engine(gguf: Path, request: GenerationRequest, job: Job) -> Iterator[LlamaEngine]:
    """The file in a server, with a slot for every row that is answered at the same time."""
    if not gguf.is_file():
        raise BadData(f"{gguf} is not there: give the output directory of the gguf stage")
    slots = max(1, min(request.batch_size >> job.memory_level, len(request.prompts)))
    context = max(map(len, request.prompts)) + len(request.opening) + request.max_new_tokens
    with llama_server(gguf, job.work / "llama.log", context, slots, request.threads) as server:
        yield LlamaEngine(gguf, server, request, slots, job)
