"""Errors and warnings about a dataset: too many faults, too few rows, uneven intents, long rows, leaks."""

from collections import Counter
from pathlib import Path, PurePath

from tasks.core.errors import BadData
from tasks.ingest import IngestConfig
from tasks.ingest.first_pass import ParsedRows
from tasks.ingest.profile import SPLITS, Profile
from tasks.ingest.row_faults import COUNTED_FAULTS
from tasks.ingest.source_files import is_exact_split_name

ENOUGH_ROWS = 500
OUT_OF_SCOPE_SHARE = 0.05
RARE_INTENT_ROWS = 10
IMBALANCE = 20
MAX_FIELDS = 10


def check_dataset(config: IngestConfig, profile: Profile, unreadable: int, out: Path) -> None:
    """Raises BadData when too many rows are faulty, or too few are left."""
    faulty = unreadable + sum(profile.faults.get(fault, 0) for fault in COUNTED_FAULTS)
    total = unreadable + sum(profile.faults.values()) + sum(profile.rows[split] for split in SPLITS)
    total += profile.preference_rows
    if faulty > config.max_quarantined_fraction * total:
        raise BadData(
            f"{faulty} of {total} rows are faulty, more than max_quarantined_fraction="
            f"{config.max_quarantined_fraction} allows. {profile.top_reasons()} All are in {out / 'quarantine.jsonl'}"
        )
    usable = profile.rows["train"] + profile.rows["validation"]
    if profile.preference_rows and not usable + profile.rows["test"]:
        raise BadData(
            f"all {profile.preference_rows} readable rows are preference rows (chosen and rejected, or answers with a "
            f"label): they are in {out / 'preference.jsonl'} for a stage that learns preferences, and there is no row "
            "with an answer to learn. Add such rows, or write the chosen (or well labelled) answers as prompt and "
            f"completion. {profile.top_reasons()}"
        )
    if usable < config.minimum_rows and not config.allow_few_rows:
        raise BadData(
            f"{usable} good rows to learn from, fewer than minimum_rows={config.minimum_rows}: collect more "
            f"(500 or better 2000), or set allow_few_rows=true. {profile.top_reasons()}"
        )
    for split in ("train", "test"):
        if not profile.rows[split]:
            raise BadData(f"no row is left for {split}: add rows, give {split}.jsonl, or change test_fraction or seed")


def advise(config: IngestConfig, profile: Profile, parsed: ParsedRows, has_tokenizer: bool) -> list[str]:
    """Warnings, each with what to do."""
    warnings = [f"{name} was skipped: it is no data file" for name in parsed.skipped_files]
    warnings += _field_warnings(profile)
    warnings += _split_name_warnings(parsed)
    train = profile.rows["train"]
    if train < ENOUGH_ROWS:
        warnings.append(
            f"Only {train} rows to train on: expect a model that knows their wordings only; aim at {ENOUGH_ROWS}."
        )
    if not profile.rows["validation"]:
        warnings.append("No row for validation: give validation.jsonl or raise validation_fraction.")
    warnings += _intent_warnings(config, profile)
    warnings += _length_warnings(config, profile, has_tokenizer)
    if profile.conflicts:
        warnings.append(f"{profile.conflicts} rows share their question with a row that answers otherwise.")
    warnings += _split_warnings(profile)
    if profile.near_duplicates and profile.near_duplicates["answered_otherwise"]:
        count = profile.near_duplicates["answered_otherwise"]
        warnings.append(f"{count} rows ask almost what another row of their split asks, and are answered otherwise.")
    if parsed.kinds.too_many:
        warnings.append("The JSON answers have too many different fields: no schema was inferred.")
    if profile.quarantined:
        warnings.append(f"{profile.quarantined} rows are in quarantine.jsonl. {profile.top_reasons()}")
    return warnings


def _split_warnings(profile: Profile) -> list[str]:
    """Rows that the splits have in common, and what was taken out of training for it."""
    warnings, notes = [], profile.split_notes
    if leaks := profile.faults.get("leak"):
        warnings.append(f"{leaks} rows were taken out of training: their question is held out.")
    if leaks := profile.faults.get("conversation_leak"):
        warnings.append(
            f"{leaks} rows were taken out of training: they begin a held-out conversation, or go on from one."
        )
    if leaks := profile.faults.get("group_leak"):
        warnings.append(f"{leaks} rows were taken out of training: their group (group_by) is held out.")
    if notes.system_twins:
        warnings.append(
            f"{notes.system_twins} held-out rows differ from a training row in the system message alone "
            f"({notes.example}): if the answer does not depend on it, their scores show what was learnt by heart. "
            "Take them out on one side, or give every row the same system message."
        )
    if notes.common_openings:
        warnings.append(
            f"{len(notes.common_openings)} first questions are shared by too many conversations to go to one split "
            f"(first: {notes.common_openings[0]}): the next question decides on their split."
        )
    if any(profile.leak_proof.asked.values()):
        warnings.append(f"Held-out answers are learnt: {profile.leak_proof.sentence()} Please report this.")
    return warnings


def _field_warnings(profile: Profile) -> list[str]:
    """What of the rows is not learnt: fields that are not read, and preference rows."""
    warnings = []
    if profile.unread:
        fields = sorted(profile.unread.items(), key=lambda item: -item[1].rows)
        names = [
            f"{name or repr(name)} ({profile.unread_share(name):.1%} of rows, e.g. {f.example})" for name, f in fields
        ]
        more = f" and {len(names) - MAX_FIELDS} more (profile.json)" if len(names) > MAX_FIELDS else ""
        warnings.append(f"Fields that are not read: {', '.join(names[:MAX_FIELDS])}{more}.")
    if profile.preference_rows:
        warnings.append(f"{profile.preference_rows} preference rows are in preference.jsonl, and in no split.")
    return warnings


def _split_name_warnings(parsed: ParsedRows) -> list[str]:
    """Files that are held out for the beginning of their name, which may say something else."""
    counts = dict(parsed.rows["file"].value_counts().iter_rows())
    return [
        f"{name} is read as {split} ({counts.get(number, 0)} rows), because its name begins like that split's; rename "
        "it if its rows are to be learnt."
        for number, (name, split) in enumerate(parsed.files)
        if split != "train" and not is_exact_split_name(PurePath(name))
    ]


def _intent_warnings(config: IngestConfig, profile: Profile) -> list[str]:
    intents, warnings = profile.intents["train"], []
    if not intents:
        return []
    share = intents.get(config.out_of_scope_intent, 0) / profile.rows["train"]
    if share < OUT_OF_SCOPE_SHARE:
        warnings.append(
            f"{share:.1%} of the training rows are {config.out_of_scope_intent}: the model will answer questions "
            f"that it should decline. Add some until they are {OUT_OF_SCOPE_SHARE:.0%} or more."
        )
    if unseen := sorted(set(profile.intents["test"]) - set(intents)):
        warnings.append(f"Held out but never trained: {', '.join(unseen)}.")
    rare = {name: count for name, count in intents.items() if count < RARE_INTENT_ROWS}
    if rare:
        examples = ", ".join(f"{name} ({count})" for name, count in sorted(rare.items(), key=lambda item: item[1])[:5])
        warnings.append(
            f"{len(rare)} intents have fewer than {RARE_INTENT_ROWS} training rows: {examples}. "
            "Add some, or merge them."
        )
    largest = max(intents, key=lambda name: intents[name])
    smallest = min(intents, key=lambda name: intents[name])
    if intents[largest] >= IMBALANCE * intents[smallest]:
        warnings.append(
            f"Intents are uneven: {intents[largest]} training rows of {largest}, {intents[smallest]} of {smallest}. "
            "The rare ones will be mistaken for the frequent ones."
        )
    spellings = Counter(map(_folded, intents))
    variants = sorted(name for name in intents if spellings[_folded(name)] > 1)
    if variants:
        warnings.append(f"Intents that differ in spelling only: {', '.join(map(repr, variants))}. Make them one.")
    return warnings


def _folded(intent: str) -> str:
    """An intent's name without differences of spelling."""
    return intent.strip().casefold().replace("-", "_").replace(" ", "_")


def _length_warnings(config: IngestConfig, profile: Profile, has_tokenizer: bool) -> list[str]:
    tokens = profile.tokens
    if not has_tokenizer:
        return ["No tokenizer was given: rows over max_length were not looked for."]
    if tokens is None or not tokens.over:
        return []
    outcome = {"drop": "in quarantine", "cut": "cut (cut.jsonl says which)"}.get(config.over_long, "an error")
    saved = ", ".join(f"{context} tokens would save {count}" for context, count in tokens.saved.items())
    return [f"{tokens.over} rows are longer than max_length={tokens.max_length} tokens and {outcome}; {saved}."]
