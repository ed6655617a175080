"""Answers and losses of a Hugging Face model: base, adapter, merged, in 8 or 4 bits."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.collator import collate, to_device
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.models.lm_head import head_of, hidden_states, unwrap
from tasks.engine.models.load import load_model
from tasks.evaluate.constrained_decoding import SchemaGuide
from tasks.evaluate.generation import Generation, GenerationRequest, Latency, Loss, Schema, Text, is_cut, truncate
from tasks.evaluate.greedy_decoding import NotFinite, decode, decode_single
from tasks.evaluate.parameters import model_statistics

LOSS_TOKENS = 4096
"""Tokens of a forward pass for the perplexity, padding included."""


class HfEngine:
    """A `tasks.evaluate.generation.Engine` on a loaded model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        request: GenerationRequest,
        slots: int,
        job: Job,
    ) -> None:
        self.model, self.tokenizer, self.request = model, tokenizer, request
        self.slots, self.job = slots, job

    def generate(self, indices: Sequence[int], schema: Schema | None = None) -> Generation:
        """Answers all prompts in `slots` slots that are refilled as rows end."""
        guide, request = None, self.request
        if schema is not None:
            width = self.model.config.get_text_config().vocab_size
            guide, request = SchemaGuide(self.tokenizer, schema, request, width), request.constrained()
        answers: dict[int, list[int]] = {}
        cut: dict[int, bool] = {}
        tokens, start = 0, time.perf_counter()
        with self._finite():
            for index, ids in decode(self.model, request, indices, self.slots, guide):
                answers[index], cut[index] = truncate(ids, request), is_cut(ids, request)
                tokens += len(ids)
                rate = tokens / (time.perf_counter() - start)
                self.job.progress(len(answers), len(indices), "rows", f"{rate:.0f} tokens/s")
        seconds = time.perf_counter() - start
        return Generation([answers[index] for index in indices], tokens, seconds, [cut[index] for index in indices])

    def time_single(self, index: int) -> Latency:
        """Answers one prompt in a batch of one."""
        with self._finite():
            return decode_single(self.model, self.request, index)

    @torch.inference_mode()
    def loss(self, texts: Sequence[Text]) -> Loss:
        """Cross-entropy of the texts, many at a time, logits in chunks."""
        head, nats, tokens = head_of(self.model), 0.0, 0
        for group in _groups(texts):
            examples = [Example(ids, [IGNORE] * start + ids[start:]) for ids, start in group]
            batch = to_device(collate(list(enumerate(examples))), self.model.device)
            nats += float(cross_entropy(hidden_states(self.model, batch), head, batch["labels"]))
            tokens += len(batch["labels"])
        if not -float("inf") < nats < float("inf"):
            raise GateFailed("the loss on the held-out answers is NaN or infinite: the weights are broken")
        return Loss(nats, tokens)

    def parameters(self) -> dict[str, Any]:
        """Statistics of the weights."""
        return model_statistics(self.model)

    @contextmanager
    def _finite(self) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            row = self.request.row_numbers[error.index]
            raise GateFailed(
                f"row {row} of the test file: logits are NaN or infinite. In float16 Gemma 3 "
                "overflows: use bfloat16 or float32; else the weights are broken, which the outlier report shows"
            ) from error


@contextmanager
def hf_engine(
    model_dir: ModelDir, tokenizer: PreTrainedTokenizerBase, request: GenerationRequest, load_in: str, job: Job
) -> Iterator[HfEngine]:
    """The model, loaded `original`, in `int8` or in `nf4`; each `Job.memory_level` halves the slots."""
    torch.set_num_threads(request.threads)
    if load_in == "int8":  # it logs the cast of every input
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    loaded = load_model(model_dir, four_bit=load_in == "nf4", eight_bit=load_in == "int8")
    if isinstance(loaded, PeftModel) and loaded.dtype == torch.float32 and load_in == "original":
        loaded = loaded.merge_and_unload()  # the same function in half the operations
    yield HfEngine(unwrap(loaded), tokenizer, request, max(1, request.batch_size >> job.memory_level), job)


def _groups(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Texts of like length, about LOSS_TOKENS a group."""
    group: list[Text] = []
    for text in sorted(texts, key=lambda text: len(text.input_ids)):
        if group and (len(group) + 1) * len(text.input_ids) > LOSS_TOKENS:
            yield group
            group = []
        group.append(text)
    if group:
        yield group
