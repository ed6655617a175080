"""The proof before delivery: llama.cpp's logits with a file against the model's in float32, on held-out rows."""

from pathlib import Path

import torch

from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.compare.agreement import Agreement, answer_start, test_rows
from tasks.engine.compare.reference_logits import ReferenceLogits
from tasks.engine.data.chat_template import IGNORE, Example, encode, prompt_ids
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.text_only import load_text_model
from tasks.engine.runtimes.llama_logits import LlamaInput, llama_logits
from tasks.engine.runtimes.llama_server import llama_server
from tasks.gguf import GgufConfig
from tasks.gguf.kinds import KINDS

# Compared token by token where no dataset is given.
TEXTS = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    '{"intent": "book_table", "entities": {"people": 4, "time": "19:30", "name": "Müller"}}',
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "Water boils at 100 °C at sea level; on a mountain of 3 000 m it boils at about 90 °C.",
    "Dear Ms Okafor, thank you for your letter of 12 May. The delivery will arrive on Thursday.",
    "La bibliothèque ouvre à neuf heures, sauf le lundi. 図書館は月曜日が休みです。 Библиотека закрыта.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144: each number is the sum of the two before it.",
    "To turn the machine off, hold the red button for three seconds, then wait until the light is out.",
)


def proof_budget(config: GgufConfig, kind: str) -> tuple[float, float]:
    """(largest mean KL, smallest top-1 agreement): the config's where set, else the kind's."""
    return (
        KINDS[kind].max_mean_kl if config.max_mean_kl is None else config.max_mean_kl,
        KINDS[kind].min_top1 if config.min_top1 is None else config.min_top1,
    )


class Proof:
    """Compares GGUFs with one model, of which only hidden states and the head stay in memory."""

    def __init__(self, config: GgufConfig, model: Path, dataset: Path | None, job: Job) -> None:
        self._job, self._model = job, model
        self.tokenizer = load_tokenizer(ModelDir(model))
        self._rows = test_rows(dataset, config.proof_rows) if dataset else []
        self._reference: ReferenceLogits | None = None
        self.warnings: list[str] = []
        self.details: dict[str, float] = {}
        if dataset is None:
            self.warnings.append(
                f"no dataset was given: the proof read {len(TEXTS)} built-in texts, which says little of your task"
            )

    def __call__(self, gguf: Path) -> Agreement:
        """Compares token ids, logits and the chat template's prompts.

        Raises GateFailed where ids or prompts differ, or llama.cpp does not run.
        """
        inputs = self._inputs()
        if self._reference is None:
            examples = [Example(row.input_ids, [IGNORE] * row.start + row.input_ids[row.start :]) for row in inputs]
            self._reference = ReferenceLogits(load_text_model(ModelDir(self._model), "float32"), examples)
        agreement, other_ids = Agreement(), []
        for i, output in enumerate(llama_logits(gguf, inputs, self._job.work / "llama.log")):
            if not _same_ids(output.ids, inputs[i].input_ids):
                other_ids.append(_difference(output.ids, inputs[i].input_ids))
            agreement.add(self._reference.logits(i), torch.tensor(output.logits))
            self._job.progress(i + 1, len(inputs), "rows", f"mean KL {agreement.mean_kl:.2g}")
        self._job.metrics(0, **agreement.metrics())
        self.details = {"rows": len(inputs), **agreement.metrics()}
        if other_ids:
            raise GateFailed(
                f"llama.cpp tokenizes {len(other_ids)} of {len(inputs)} conversations otherwise than the model's "
                f"tokenizer; the first {other_ids[0]}. Generation would see what training never showed"
            )
        if self._rows and not agreement.not_finite:
            self._check_template(gguf)
        return agreement

    def _inputs(self) -> list[LlamaInput]:
        if not self._rows:
            return [LlamaInput(text, list(self.tokenizer(text)["input_ids"]), 1) for text in TEXTS]
        examples = [encode(self.tokenizer, row) for row in self._rows]
        texts = [
            str(self.tokenizer.apply_chat_template([message.model_dump() for message in row.messages], tokenize=False))
            for row in self._rows
        ]
        rows = zip(texts, examples, strict=True)
        return [LlamaInput(text, example.input_ids, answer_start(example)) for text, example in rows]

    def _check_template(self, gguf: Path) -> None:
        """Raises GateFailed where llama.cpp's server makes another prompt of messages than Hugging Face."""
        with llama_server(gguf, self._job.work / "llama.log") as server:
            for i, row in enumerate(self._rows):
                prompt = server.post("/apply-template", messages=row.prompt)["prompt"]
                ids = server.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
                expected = prompt_ids(self.tokenizer, row.prompt)
                if ids != expected:
                    raise GateFailed(
                        f"llama.cpp's chat template makes another prompt of row {i} than Hugging Face's: "
                        f"{_difference(ids, expected)}. Applications that send messages would get other answers"
                    )
        self.details["prompts"] = len(self._rows)


def _same_ids(ids: list[int], expected: list[int]) -> bool:
    """Whether ids are equal but for what training adds (BOS, end of turn) or cuts (behind the end of turn)."""
    ids = ids if ids[:1] == expected[:1] else [expected[0], *ids]
    return ids[: len(expected)] == expected or ids == expected[:-1]


def _difference(ids: list[int], expected: list[int]) -> str:
    pairs = enumerate(zip(ids, expected, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(expected)))
    return f"at token {position}: {ids[position : position + 4]} for {expected[position : position + 4]}"
