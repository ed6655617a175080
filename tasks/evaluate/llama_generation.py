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
from tasks.evaluate.generation import Answered, Asked, Latency, Loss, Schema, Text, cut
from tasks.evaluate.parameters import gguf_statistics

ROUNDS = 4
"""Requests hold so many rows a slot: enough to keep slots busy, few enough to show progress."""


class LlamaEngine:
    """A `tasks.evaluate.generation.Engine` on a GGUF file in a running server."""

    def __init__(self, gguf: Path, server: Server, asked: Asked, slots: int, job: Job) -> None:
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
            labels = text.input_ids[text.start :]
            nats += sum(_nats(row, label) for row, label in zip(output.logits, labels, strict=True))
            tokens += len(labels)
        if not math.isfinite(nats):
            raise GateFailed("llama.cpp's loss is NaN or infinite: the GGUF is broken")
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
        found = self.server.post(
            "/completion", prompt=prompts, n_predict=self.asked.max_new_tokens, return_tokens=True, cache_prompt=False,
            response_fields=fields, **greedy, **checked, **options,
        )  # fmt: skip
        return sorted(found if isinstance(found, list) else [found], key=lambda result: int(result["index"]))

    def _assert_finite(self, place: int, result: dict[str, Any]) -> None:
        """A candidate whose logit is NaN or infinite has no probability; llama.cpp writes it as null."""
        for token in result.get("completion_probabilities", []):
            if token["prob"] is None or not math.isfinite(token["prob"]):
                row = self.asked.rows[place]
                raise GateFailed(f"row {row} of the test file: llama.cpp's logits are not finite. The GGUF is broken")


def _nats(logits: NDArray[np.float32], label: int) -> float:
    """Cross-entropy of one token, in float64; a row at a time, for a window of a large vocabulary is 270 MB already."""
    top = logits.max()
    return float(np.log(np.exp(logits - top, dtype=np.float64).sum()) + top - logits[label])


@contextmanager
def llama_engine(gguf: Path, asked: Asked, job: Job) -> Iterator[LlamaEngine]:
    """The file in a server, with a slot for every row that is answered at the same time."""
    if not gguf.is_file():
        raise BadData(f"{gguf} is not there: give the output directory of the gguf stage")
    slots = max(1, min(asked.batch_size >> job.rung, len(asked.prompts)))
    context = max(map(len, asked.prompts)) + asked.max_new_tokens
    with llama_server(gguf, job.work / "llama.log", context, slots, asked.threads) as server:
        yield LlamaEngine(gguf, server, asked, slots, job)
