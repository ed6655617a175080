"""Greedy answers from a Hugging Face model: batches of like length, padded on the left, stopped at end of turn."""

import time
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.load import load_model
from tasks.evaluate.asked import Answered, Asked, cut


class FiniteLogits(LogitsProcessor):
    """Remembers on the device which rows ever had NaN or infinite logits: one look a batch, not one a token."""

    def __init__(self) -> None:
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Passes `scores` [rows, vocabulary] on as they are."""
        now = ~(scores.amax(-1).isfinite() & scores.amin(-1).isfinite())
        self.broken = now if self.broken is None else self.broken | now
        return scores


def answer_hf(model_dir: ModelDir, asked: Asked, job: Job) -> Answered:
    """Loads the model and answers all prompts, longest first; raises GateFailed for logits that are not finite."""
    torch.set_num_threads(asked.threads)
    model = load_model(model_dir)
    if isinstance(model, PeftModel) and model.dtype == torch.float32:  # the same function in half the operations
        model = model.merge_and_unload()
    order = sorted(range(len(asked.prompts)), key=lambda row: -len(asked.prompts[row]))
    answers: list[list[int]] = [[] for _ in order]
    generated, size = 0, asked.batch_size >> job.rung or 1
    if asked.warmup_rows:
        _generate(model, asked, order[: asked.warmup_rows])
    start = time.perf_counter()
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        for row, ids in zip(rows, _generate(model, asked, rows), strict=True):
            answers[row] = cut(ids, asked.ends)
            generated += min(len(answers[row]) + 1, len(ids))
        rate = generated / (time.perf_counter() - start)
        job.progress(first + len(rows), len(order), "rows", f"{rate:.0f} tokens/s")
    return Answered(answers, generated, time.perf_counter() - start)


@torch.inference_mode()
def _generate(model: PreTrainedModel, asked: Asked, rows: list[int]) -> list[list[int]]:
    """New ids of each row, up to where the batch's last row ended."""
    prompts = [asked.prompts[row] for row in rows]
    width = max(map(len, prompts))
    pad = min(asked.ends)  # masked, so any id serves; a row that has ended is filled with it
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    finite = FiniteLogits()
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=asked.max_new_tokens, eos_token_id=sorted(asked.ends), pad_token_id=pad
    )
    model.generation_config = settings  # the model's own could add temperature, or tokens to suppress
    generate: Any = model.generate
    output = generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([finite]),
    )
    if finite.broken is not None and finite.broken.any():
        row = asked.rows[rows[int(finite.broken.nonzero()[0])]]
        raise GateFailed(
            f"row {row} of the test file: logits are NaN or infinite. In float16 Gemma 3 overflows: use bfloat16 or "
            "float32; else the weights are broken, which the outlier report shows"
        )
    return list(output[:, width:].tolist())
