"""A student with a smaller vocabulary: made, shown to split data as before, taught by a teacher with the whole one.

The teacher goes on reading its own ids. Its head keeps the rows of the kept pieces, so that its softmax is the whole
distribution restricted to them and renormalised, exactly.
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
from tasks.distill.vocabulary import Pieces, choose
from tasks.distill.vocabulary_files import config_ids, write_trimmed
from tasks.engine.data.chat_template import IGNORE, Example, encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.distributed import ranks
from tasks.engine.losses.loss_mix import Head
from tasks.engine.weights.safetensors_reader import stored_tensors

PROBE = 'Turn  valve 17 on:\n\t{"intent": "Größe №5 🔧", "entities": {}}\r\n<b>Ωmega</b> ⅓ 東京 \x07'
SEEN = ("train.jsonl", "validation.jsonl", "calibration.jsonl")  # not the held-out rows: they tell what it costs


class Trimmed(NamedTuple):
    """The trimmed student, and the old ids of its pieces in their new order."""

    student: ModelDir
    kept: list[int]

    def examples(self, examples: Iterable[Example]) -> list[Example]:
        """Examples in old ids, in new ones."""
        new = {old: place for place, old in enumerate(self.kept)} | {IGNORE: IGNORE}
        return [Example([new[i] for i in one.input_ids], [new[i] for i in one.labels]) for one in examples]

    def head(self, head: Head) -> Head:
        """The rows (kept, H) of the teacher's head (V, H)."""
        return Head(head.weight[torch.tensor(self.kept, device=head.weight.device)], head.softcap)


def trim(
    config: DistillConfig,
    student: ModelDir,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Path,
    texts: Path | None,
    report: Report,
    job: Job,
) -> Trimmed | None:
    """The student with `config.vocabulary` pieces, below `job.work`; None when it keeps them all.

    `texts` (a file or a directory of files) ranks what the data do not need. Raises BadConfig when the data need more
    pieces, GateFailed when text is not split or spelt as before.
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
    needed = {index for ids in data for index in ids} | config_ids(student.base, rows)
    needed |= {index for index in tokenizer.all_special_ids if index < rows}
    counted = Counter(i for line in _lines(texts) for i in tokenizer(line, add_special_tokens=False)["input_ids"])
    wanted = sorted(counted, key=lambda index: (-counted[index], index))
    kept = choose(pieces, needed, wanted, config.vocabulary, rows)
    own = job.work / (f"trimmed-{ranks.rank()}" if ranks.rank() else "trimmed")
    trimmed = Trimmed(write_trimmed(student.base, pieces, kept, own), kept)
    small = load_tokenizer(trimmed.student, config.chat_template)
    _prove(tokenizer, small, trimmed, dataset, data)
    before, after = (_held_out_tokens(one, dataset) for one in (tokenizer, small))
    job.log(
        f"{len(kept)} of {rows} pieces are kept, {len(needed)} of them used by the data; held-out rows take {after} "
        f"tokens in place of {before}"
    )
    numbers = {"rows": len(kept), "rows_before": rows, "used_by_data": len(needed)}
    report.details["vocabulary"] = numbers | {"held_out_tokens": after, "held_out_tokens_before": before}
    if counted:
        report.details["vocabulary"]["texts_covered"] = sum(counted[i] for i in kept) / counted.total()
    return trimmed


def _prove(
    tokenizer: PreTrainedTokenizerBase,
    small: PreTrainedTokenizerBase,
    trimmed: Trimmed,
    dataset: Path,
    data: Sequence[list[int]],
) -> None:
    new = {old: place for place, old in enumerate(trimmed.kept)}
    for number, (old, ids) in enumerate(zip(data, _ids(small, dataset), strict=True), start=1):
        if ids != [new[index] for index in old]:
            raise GateFailed(
                f"vocabulary: row {number} of {', '.join(SEEN)} is split otherwise by the trimmed tokenizer: "
                f"{small.convert_ids_to_tokens(ids)[:20]} for {tokenizer.convert_ids_to_tokens(old)[:20]}"
            )
    spelt = [str(one.decode(one(PROBE, add_special_tokens=False)["input_ids"])) for one in (tokenizer, small)]
    if spelt[0] != spelt[1]:
        raise GateFailed(f"vocabulary: the trimmed tokenizer spells {spelt[0]!r} as {spelt[1]!r}")


def _ids(tokenizer: PreTrainedTokenizerBase, dataset: Path) -> list[list[int]]:
    files = [dataset / name for name in SEEN if (dataset / name).is_file()]
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
