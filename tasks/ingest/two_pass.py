"""The whole of the stage: two passes over the rows, what is decided between them, and the profile of what came out."""

import shutil
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import polars as pl

from tasks.core.command import Report
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.ingest import IngestConfig
from tasks.ingest.advice import advise, gate
from tasks.ingest.page import write_profile
from tasks.ingest.profile import SPLITS, Profile, count_intents, count_reasons, quantiles
from tasks.ingest.reasons import Reasons
from tasks.ingest.row_outcomes import count_conflicts
from tasks.ingest.row_selection import Judged, judge
from tasks.ingest.stage import Staged, stage_rows
from tasks.ingest.write import show_quarantine, write_splits

LENGTHS = ("prompt", "answer")


def make_dataset(config: IngestConfig, files: Path, out: Path, job: Job, tokenizer: ModelDir | None) -> Report:
    """See `tasks.ingest.run.ingest`."""
    # matplotlib takes most of a second to import: meanwhile rows are read.
    Thread(target=import_module, args=("matplotlib.figure",), daemon=True).start()
    scratch = job.work / "staged"
    shutil.rmtree(scratch, ignore_errors=True)
    with (out / "quarantine.jsonl").open("wb") as quarantine:
        staged = stage_rows(config, files, scratch, quarantine, job)
        judged = judge(config, staged, tokenizer, job)
        reasons = Reasons(staged, judged.found, judged.compared)
        write_splits(staged, judged, reasons, out, quarantine, job)
    shutil.rmtree(scratch)
    if judged.cut:
        _write_cut(judged, reasons, config, out)
    show_quarantine(out)
    profile = _profile(staged, judged, out)
    gate(config, profile, staged.faults, out)
    warnings = advise(config, profile, staged, tokenizer is not None)
    lengths = {name: dict(judged.good[f"{name}_chars"].value_counts(sort=True).iter_rows()) for name in LENGTHS}
    write_profile(profile, lengths, out, warnings)
    counts = {
        **{f"{name}_rows": count for name, count in profile.rows.items()},
        "quarantined_rows": profile.quarantined,
    }
    return Report(facts=counts | _facts(config, profile), metrics=dict(counts), warnings=warnings)


def _profile(staged: Staged, judged: Judged, out: Path) -> Profile:
    good = judged.good
    no_intents: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    intents, entities = count_intents(good, staged.kinds) if judged.answers == "json" else (no_intents, {})
    reasons, first = count_reasons(out / "quarantine.jsonl")
    rows = {split: good.filter(pl.col("split") == split).height for split in SPLITS}
    return Profile(
        answers=judged.answers,
        shapes=staged.shapes,
        rows=rows | {"calibration": len(judged.calibration)},
        intents=intents,
        entities=entities,
        schema=judged.schema,
        faults=dict(judged.found.faults["fault"].value_counts(sort=True).iter_rows()),
        reasons=reasons,
        first=first,
        kept_conflicts=count_conflicts(good, "question"),
        near=judged.near,
        characters={name: quantiles(good[f"{name}_chars"]) for name in LENGTHS},
        tokens=judged.tokens,
    )


def _write_cut(judged: Judged, reasons: Reasons, config: IngestConfig, out: Path) -> None:
    """cut.jsonl: which rows were shortened, and from how many tokens."""
    with (out / "cut.jsonl").open("wb") as file:
        for row, (_, tokens) in judged.cut.items():
            name, _, line = reasons.where(row).rpartition(":")
            told = {"file": name, "line": int(line), "tokens": tokens, "max_length": config.max_length}
            file.write(orjson.dumps(told) + b"\n")


def _facts(config: IngestConfig, profile: Profile) -> dict[str, Any]:
    intents = profile.intents["train"]
    return {
        "answers": profile.answers,
        "intents": len(intents),
        "out_of_scope_rows": intents.get(config.out_of_scope_intent, 0),
    }
