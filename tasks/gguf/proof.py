"""The proof before publishing: llama.cpp with this file against the model in float32, on held-out rows."""

from pathlib import Path

import torch

from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.agreement import Agreement, answer_logits, answer_start, held_out
from tasks.engine.chat import encode
from tasks.engine.llama import LlamaInput, llama_logits
from tasks.engine.load import load_model, load_tokenizer
from tasks.gguf import GgufConfig

# (largest mean KL, smallest top-1 agreement): generous where the format is coarse, for models of a few million
# parameters lose more than large ones; the numbers are always reported.
BUDGETS = {
    "F32": (0.001, 0.99),
    "F16": (0.005, 0.98),
    "BF16": (0.01, 0.98),
    "Q8_0": (0.02, 0.97),
    "Q6_K": (0.05, 0.95),
    "Q5": (0.15, 0.92),
    "Q4_K": (0.4, 0.85),
    "IQ4": (0.4, 0.85),
    "Q4": (0.6, 0.80),
    "Q3": (1.0, 0.70),
    "Q2": (2.0, 0.50),
}


def budget(config: GgufConfig) -> tuple[float, float]:
    """(largest mean KL, smallest top-1 agreement): the config's where set, else the kind's."""
    max_mean_kl, min_top1 = next(value for prefix, value in BUDGETS.items() if config.kind.startswith(prefix))
    return (
        max_mean_kl if config.max_mean_kl is None else config.max_mean_kl,
        min_top1 if config.min_top1 is None else config.min_top1,
    )


def prove(config: GgufConfig, gguf: Path, model: Path, dataset: Path, job: Job) -> Agreement:
    """Compares token ids and logits of templated conversations; raises GateFailed with the numbers."""
    reference = load_model(ModelDir(model), "float32")
    tokenizer = load_tokenizer(ModelDir(model))
    rows = held_out(dataset, config.proof_rows)
    examples = [encode(tokenizer, row) for row in rows]
    texts = [
        tokenizer.apply_chat_template([message.model_dump() for message in row.messages], tokenize=False)
        for row in rows
    ]
    inputs = [
        LlamaInput(str(text), example.input_ids, answer_start(example))
        for text, example in zip(texts, examples, strict=True)
    ]
    agreement = Agreement()
    other_ids = []
    for i, output in enumerate(llama_logits(gguf, inputs, job.work / "llama.log")):
        if not _same_ids(output.ids, examples[i].input_ids):
            other_ids.append(_difference(output.ids, examples[i].input_ids))
        agreement.add(answer_logits(reference, examples[i]), torch.tensor(output.logits))
        job.progress(i + 1, len(rows), "rows", f"mean KL {agreement.mean_kl:.2g}")
    job.metrics(0, **agreement.metrics())
    if other_ids:
        raise GateFailed(
            f"llama.cpp tokenizes {len(other_ids)} of {len(rows)} conversations otherwise than the model's tokenizer; "
            f"the first {other_ids[0]}. Generation would see what training never showed"
        )
    agreement.gate(f"the {config.kind} GGUF", *budget(config))
    return agreement


def _same_ids(ids: list[int], expected: list[int]) -> bool:
    """Equal up to what training adds (BOS, end of turn) or leaves out (what follows the end of turn)."""
    ids = ids if ids[:1] == expected[:1] else [expected[0], *ids]
    return ids[: len(expected)] == expected or ids == expected[:-1]


def _difference(ids: list[int], expected: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
    return f"at token {at}: {ids[at : at + 4]} for {expected[at : at + 4]}"
