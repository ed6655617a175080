"""Runs the two passes over the rows, the selection between them, and the profile of the dataset."""

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
from tasks.ingest.advice import advise, check_dataset
from tasks.ingest.first_pass import ParsedRows, parse_files
from tasks.ingest.leak_proof import prove_splits
from tasks.ingest.page import write_profile
from tasks.ingest.profile import SPLITS, Profile, SplitNotes, count_intents, count_reasons, quantiles
from tasks.ingest.reasons import QuarantineReasons
from tasks.ingest.row_faults import count_conflicts
from tasks.ingest.row_selection import Selection, select_rows
from tasks.ingest.write import copy_quarantine_to_report, write_preferences, write_splits

LENGTHS = ("prompt", "answer")


def make_dataset(config: IngestConfig, files: Path, out: Path, job: Job, tokenizer: ModelDir | None) -> Report:
    """See `tasks.ingest.run.ingest`."""
    # matplotlib takes most of a second to import: meanwhile rows are read.
    Thread(target=import_module, args=("matplotlib.figure",), daemon=True).start()
    scratch = job.work / "parsed"
    shutil.rmtree(scratch, ignore_errors=True)
    with (out / "quarantine.jsonl").open("wb") as quarantine:
        parsed = parse_files(config, files, scratch, quarantine, job)
        selection = select_rows(config, parsed, tokenizer, job)
        reasons = QuarantineReasons(parsed, selection.fault_details, selection.split_rows)
        write_splits(parsed, selection, reasons, out, quarantine, job)
        preference_rows = write_preferences(parsed, selection, out, quarantine)
    shutil.rmtree(scratch)
    if selection.cut:
        _write_cut(selection, reasons, config, out)
    copy_quarantine_to_report(out)
    job.progress(0, 1, "steps", "proving that no held-out answer is learnt")
    profile = _profile(parsed, selection, preference_rows, reasons, out)
    check_dataset(config, profile, parsed.faults, out)
    warnings = advise(config, profile, parsed, tokenizer is not None)
    lengths = {name: dict(selection.good[f"{name}_chars"].value_counts(sort=True).iter_rows()) for name in LENGTHS}
    write_profile(profile, lengths, out, warnings)
    counts = {
        **{f"{name}_rows": count for name, count in profile.rows.items()},
        "quarantined_rows": profile.quarantined,
    }
    if profile.preference_rows:
        counts["preference_rows"] = profile.preference_rows
    return Report(facts=counts | _facts(config, profile), metrics=dict(counts), warnings=warnings)


def _profile(
    parsed: ParsedRows, selection: Selection, preference_rows: int, quarantined: QuarantineReasons, out: Path
) -> Profile:
    good = selection.good
    no_intents: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    intents, entities = count_intents(good, parsed.kinds) if selection.answers == "json" else (no_intents, {})
    reasons, first_rows = count_reasons(out / "quarantine.jsonl")
    rows = {split: good.filter(pl.col("split") == split).height for split in SPLITS}
    return Profile(
        answers=selection.answers,
        shapes=parsed.shapes,
        rows=rows | {"calibration": len(selection.calibration)},
        preference_rows=preference_rows,
        unread=parsed.unread,
        readable_rows=parsed.rows.height + len(parsed.preferences.rows),
        intents=intents,
        entities=entities,
        schema=selection.schema,
        faults=dict(selection.fault_details.faults["fault"].value_counts(sort=True).iter_rows()),
        reasons=reasons,
        first_rows=first_rows,
        conflicts=count_conflicts(good, "question"),
        near_duplicates=selection.near_duplicates,
        characters={name: quantiles(good[f"{name}_chars"]) for name in LENGTHS},
        tokens=selection.tokens,
        leak_proof=prove_splits(out),
        split_notes=_split_notes(selection, quarantined),
    )


def _split_notes(selection: Selection, reasons: QuarantineReasons) -> SplitNotes:
    twins, openings = selection.system_twins, [reasons.location(row) for row in selection.common_openings]
    example = f"first: {reasons.location(twins.held_out)} and {reasons.location(twins.train)}" if twins else ""
    return SplitNotes(twins.rows if twins else 0, example, openings)


def _write_cut(selection: Selection, reasons: QuarantineReasons, config: IngestConfig, out: Path) -> None:
    """Writes cut.jsonl: file, line and former tokens of the rows that were shortened."""
    with (out / "cut.jsonl").open("wb") as file:
        for row, cut in selection.cut.items():
            name, _, line = reasons.location(row).rpartition(":")
            entry = {"file": name, "line": int(line), "tokens": cut.tokens, "max_length": config.max_length}
            file.write(orjson.dumps(entry) + b"\n")


def _facts(config: IngestConfig, profile: Profile) -> dict[str, Any]:
    intents = profile.intents["train"]
    return {
        "answers": profile.answers,
        "intents": len(intents),
        "out_of_scope_rows": intents.get(config.out_of_scope_intent, 0),
        "held_out_answers": sum(profile.leak_proof.answers.values()),
        "held_out_answers_learnt": sum(profile.leak_proof.learnt.values()),
    }
