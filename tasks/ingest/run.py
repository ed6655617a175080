"""Turns a team's own files into checked rows: train, validation, test, and a quarantine with reasons.

python -m tasks.ingest.run config.json --files DIR_OR_FILE --out DIR [--tokenizer MODEL_DIR]
"""

from pathlib import Path
from typing import IO, Any

import polars as pl

from tasks.core.command import Report, command
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.ingest import IngestConfig
from tasks.ingest.profile import Profile, write_profile
from tasks.ingest.read import Record
from tasks.ingest.stage import Staged, stage_rows, write_quarantine
from tasks.ingest.verdict import answers_kind, conflicting_rows, verdicts

SPLITS = ("train", "validation", "test")
FEW = 500
OUT_OF_SCOPE_SHARE = 0.05
EVERY = 5000


def ingest(config: IngestConfig, files: Path, out: Path, job: Job, tokenizer: ModelDir | None = None) -> Report:
    """`files` is a file or a directory; `tokenizer` is a model whose tokens the profile counts.

    Raises BadData for files that cannot be used at all, too few good rows, or too many faulty ones.
    """
    staged_path = job.work / "staged.jsonl"
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        staged = stage_rows(config, files, staged_path, quarantine, job)
        frame = verdicts(config, staged)
        profile = _write_splits(config, staged, frame, staged_path, out, quarantine, job)
    staged_path.unlink()
    profile.add_quarantine(out / "quarantine.jsonl")
    _gate(config, profile, staged.faults + profile.faults["not_json"] + profile.faults["conflict"], out)
    profile.kept_conflicts = conflicting_rows(frame)
    if tokenizer is not None:
        profile.count_tokens(tokenizer, out / "train.jsonl")
    warnings = _warnings(config, profile, staged)
    write_profile(profile, frame, out, warnings)
    return Report(facts=_facts(config, profile), metrics=dict(_counts(profile)), warnings=warnings)


def _write_splits(
    config: IngestConfig, staged: Staged, frame: pl.DataFrame, path: Path, out: Path, quarantine: IO[str], job: Job
) -> Profile:
    """Second pass: copies staged lines to where their verdict says, and counts."""
    profile = Profile(answers_kind(config, staged), staged.shapes)
    columns = frame.select("file", "line", "split", "fault", "other").iter_rows()
    files = {name: (out / f"{name}.jsonl").open("w", encoding="utf-8") for name in SPLITS}
    try:
        with path.open(encoding="utf-8", newline="\n") as rows:
            for number, (text, (file, line, split, fault, other)) in enumerate(zip(rows, columns, strict=True)):
                canonical, _, raw = text.rstrip("\n").partition("\t")
                if fault is None:
                    files[split].write(canonical + "\n")
                    profile.add(split, canonical)
                else:
                    profile.faults[fault] += 1
                    where = "" if other is None else f"{staged.files[frame['file'][other]][0]}:{frame['line'][other]}"
                    record = Record(staged.files[file][0], line, raw, None)
                    write_quarantine(quarantine, record, _reason(fault, where, split))
                if number % EVERY == 0:
                    job.progress(number, frame.height, "rows", "writing")
    finally:
        for stream in files.values():
            stream.close()
    job.progress(frame.height, frame.height, "rows", "written")
    return profile


def _reason(fault: str, where: str, split: str) -> str:
    return {
        "not_json": "the answer should be a JSON object, as most answers are, and is not",
        "leak": f"the same question is held out ({where}), so {split} must not hold it",
        "duplicate": f"duplicate of {where}",
        "conflict": f"the same question has another answer at {where}; keep the right one",
    }[fault]


def _gate(config: IngestConfig, profile: Profile, faulty: int, out: Path) -> None:
    """Raises BadData when too many rows are faulty, or too few are left."""
    total = faulty + sum(profile.rows.values()) + profile.faults["leak"] + profile.faults["duplicate"]
    if faulty > config.max_quarantined_fraction * total:
        raise BadData(
            f"{faulty} of {total} rows are faulty, more than max_quarantined_fraction="
            f"{config.max_quarantined_fraction} allows. {profile.top_reasons()} All are in {out / 'quarantine.jsonl'}"
        )
    learnt = profile.rows["train"] + profile.rows["validation"]
    if learnt < config.minimum_rows and not config.allow_few_rows:
        raise BadData(
            f"{learnt} good rows to learn from, fewer than minimum_rows={config.minimum_rows}: collect more "
            f"(500 or better 2000), or set allow_few_rows=true. {profile.top_reasons()}"
        )
    for split in ("train", "test"):
        if not profile.rows[split]:
            raise BadData(f"no row is left for {split}: add rows, give {split}.jsonl, or change test_fraction or seed")


def _warnings(config: IngestConfig, profile: Profile, staged: Staged) -> list[str]:
    warnings = [f"{name} was passed over: it is no data file" for name in staged.passed_over]
    train, intents = profile.rows["train"], profile.intents["train"]
    if train < FEW:
        warnings.append(f"Only {train} rows to train on: expect a model that knows their wordings only; aim at {FEW}.")
    if not profile.rows["validation"]:
        warnings.append("No row for validation: give validation.jsonl or raise validation_fraction.")
    if intents:
        share = intents[config.out_of_scope_intent] / train
        if share < OUT_OF_SCOPE_SHARE:
            warnings.append(
                f"{share:.1%} of the training rows are {config.out_of_scope_intent}: the model will answer questions "
                f"that it should decline. Add some until they are {OUT_OF_SCOPE_SHARE:.0%} or more."
            )
        unseen = sorted(set(profile.intents["test"]) - set(intents))
        if unseen:
            warnings.append(f"Held out but never trained: {', '.join(unseen)}.")
    if profile.kept_conflicts:
        warnings.append(f"{profile.kept_conflicts} rows share their question with a row that answers otherwise.")
    if profile.faults["leak"]:
        warnings.append(f"{profile.faults['leak']} rows were taken out of training: their question is held out.")
    if profile.quarantined:
        warnings.append(f"{profile.quarantined} rows are in quarantine.jsonl. {profile.top_reasons()}")
    return warnings


def _counts(profile: Profile) -> dict[str, int]:
    return {**{f"{split}_rows": profile.rows[split] for split in SPLITS}, "quarantined_rows": profile.quarantined}


def _facts(config: IngestConfig, profile: Profile) -> dict[str, Any]:
    intents = profile.intents["train"]
    return {
        **_counts(profile),
        "answers": profile.answers,
        "intents": len(intents),
        "out_of_scope_rows": intents[config.out_of_scope_intent],
    }


if __name__ == "__main__":
    command(ingest)
