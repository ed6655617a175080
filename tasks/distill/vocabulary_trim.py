"""Reduces the student's vocabulary and verifies that the data are tokenized as before.

The teacher still reads its own ids. Its head is cut to the rows of the student's pieces, so that its softmax is exactly
its full distribution restricted to them and renormalised.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report
from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import read_rows
from tasks.distill import DistillConfig
from tasks.distill.vocabulary import Pieces, choose_pieces
from tasks.distill.vocabulary_files import config_ids, write_trimmed
from tasks.engine.data.chat_template import IGNORE, Example, encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.distributed import ranks
from tasks.engine.losses.loss_mix import Head
from tasks.engine.weights.safetensors_reader import stored_tensors

PROBE = 'Turn  valve 17 on:\n\t{"intent": "Größe №5 🔧", "entities": {}}\r\n<b>Ωmega</b> ⅓ 東京 \x07'
CHECKED_FILES = ("train.jsonl", "validation.jsonl", "calibration.jsonl")  # held-out rows measure the cost


class TrimmedVocabulary(NamedTuple):
    """The trimmed student, and the teacher's ids of its pieces: piece i was `piece_ids[i]`."""

    student: ModelDir
    piece_ids: list[int]

    def examples(self, examples: Iterable[Example]) -> list[Example]:
        """The examples with the student's ids in place of the teacher's."""
        new_ids = {old: index for index, old in enumerate(self.piece_ids)} | {IGNORE: IGNORE}
        return [
            Example([new_ids[i] for i in example.input_ids], [new_ids[i] for i in example.labels])
            for example in examples
        ]

    def head(self, head: Head) -> Head:
        """The teacher's head (W, G) cut to the student's pieces (V, G)."""
        return Head(head.weight[torch.tensor(self.piece_ids, device=head.weight.device)], head.softcap)


def trim(
    config: DistillConfig,
    student: ModelDir,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Path,
    texts: Path | None,
    report: Report,
    job: Job,
) -> TrimmedVocabulary | None:
    """The student with `config.vocabulary` pieces, written below `job.work`; None where that is null.

    `texts` (a file or a directory of files) ranks the pieces that the data do not use. Raises BadConfig when the data
    use more pieces, GateFailed when text is not tokenized or decoded as before.
    """
    if config.vocabulary is None:
        if texts is not None:
            report.warnings.append("texts are ignored: they rank the pieces of a smaller vocabulary, which is null")
        return None
    if student.adapter is not None:
        raise BadConfig(f"vocabulary: {student} carries an adapter: merge it into its base first, or set it to null")
    pieces = Pieces(student.base / "tokenizer.model")
    rows = min(stored.shape[0] for name, stored in stored_tensors(student.base).items() if "embed_tokens" in name)
    data = _ids(tokenizer, dataset)
    used = {index for ids in data for index in ids} | config_ids(student.base, rows)
    used |= {index for index in tokenizer.all_special_ids if index < rows}
    counts = Counter(i for line in _lines(texts) for i in tokenizer(line, add_special_tokens=False)["input_ids"])
    by_frequency = sorted(counts, key=lambda index: (-counts[index], index))
    piece_ids = choose_pieces(pieces, used, by_frequency, config.vocabulary, rows)
    directory = job.work / (f"trimmed-{ranks.rank()}" if ranks.rank() else "trimmed")
    trimmed = TrimmedVocabulary(write_trimmed(student.base, pieces, piece_ids, directory), piece_ids)
    trimmed_tokenizer = load_tokenizer(trimmed.student, config.chat_template)
    _require_same_tokens(tokenizer, trimmed_tokenizer, trimmed, dataset, data)
    before, after = (_held_out_tokens(each, dataset) for each in (tokenizer, trimmed_tokenizer))
    job.log(
        f"the vocabulary has {len(piece_ids)} of {rows} pieces, {len(used)} of them used by the data; held-out rows "
        f"take {after} tokens in place of {before}"
    )
    sizes = {"rows": len(piece_ids), "rows_before": rows, "used_by_data": len(used)}
    report.details["vocabulary"] = sizes | {"held_out_tokens": after, "held_out_tokens_before": before}
    if counts:
        report.details["vocabulary"]["texts_covered"] = sum(counts[i] for i in piece_ids) / counts.total()
    return trimmed


def _require_same_tokens(
    tokenizer: PreTrainedTokenizerBase,
    trimmed_tokenizer: PreTrainedTokenizerBase,
    trimmed: TrimmedVocabulary,
    dataset: Path,
    data: Sequence[list[int]],
) -> None:
    """Raises GateFailed where the trimmed tokenizer gives a row other pieces, or text another round trip."""
    new_ids = {old: index for index, old in enumerate(trimmed.piece_ids)}
    for number, (old, ids) in enumerate(zip(data, _ids(trimmed_tokenizer, dataset), strict=True), start=1):
        if ids != [new_ids[index] for index in old]:
            raise GateFailed(
                f"vocabulary: row {number} of {', '.join(CHECKED_FILES)} is tokenized differently by the trimmed "
                "tokenizer: "
                f"{trimmed_tokenizer.convert_ids_to_tokens(ids)[:20]} for {tokenizer.convert_ids_to_tokens(old)[:20]}"
            )
    expected, decoded = (
        str(each.decode(each(PROBE, add_special_tokens=False)["input_ids"])) for each in (tokenizer, trimmed_tokenizer)
    )
    if decoded != expected:
        raise GateFailed(f"vocabulary: the trimmed tokenizer decodes {expected!r} as {decoded!r}")


def _ids(tokenizer: PreTrainedTokenizerBase, dataset: Path) -> list[list[int]]:
    files = [dataset / name for name in CHECKED_FILES if (dataset / name).is_file()]
    return [encode(tokenizer, row).input_ids for file in files for row in read_rows(file)]


def _held_out_tokens(tokenizer: PreTrainedTokenizerBase, dataset: Path) -> int:
    file = dataset / "test.jsonl"
    return sum(len(encode(tokenizer, row).input_ids) for row in read_rows(file)) if file.is_file() else 0


def _lines(texts: Path | None) -> Iterable[str]:
    if texts is None:
        return
    for file in sorted(path for path in texts.rglob("*") if path.is_file()) if texts.is_dir() else [texts]:
        with file.open(encoding="utf-8") as lines:
            yield from lines
