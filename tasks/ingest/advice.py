"""What a person should know of the data: errors that stop the stage, and warnings."""

from collections import Counter
from pathlib import Path

from tasks.core.errors import BadData
from tasks.ingest import IngestConfig
from tasks.ingest.profile import SPLITS, Profile
from tasks.ingest.row_outcomes import FAULTY
from tasks.ingest.stage import Staged

FEW = 500
OUT_OF_SCOPE_SHARE = 0.05
RARE = 10
UNEVEN = 20


def gate(config: IngestConfig, profile: Profile, unreadable: int, out: Path) -> None:
    """Raises BadData when too many rows are faulty, or too few are left."""
    faulty = unreadable + sum(profile.faults.get(fault, 0) for fault in FAULTY)
    total = unreadable + sum(profile.faults.values()) + sum(profile.rows[split] for split in SPLITS)
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


def advise(config: IngestConfig, profile: Profile, staged: Staged, has_tokenizer: bool) -> list[str]:
    """Warnings, each with what to do."""
    warnings = [f"{name} was passed over: it is no data file" for name in staged.passed_over]
    train = profile.rows["train"]
    if train < FEW:
        warnings.append(f"Only {train} rows to train on: expect a model that knows their wordings only; aim at {FEW}.")
    if not profile.rows["validation"]:
        warnings.append("No row for validation: give validation.jsonl or raise validation_fraction.")
    warnings += _of_intents(config, profile)
    warnings += _of_lengths(config, profile, has_tokenizer)
    if profile.kept_conflicts:
        warnings.append(f"{profile.kept_conflicts} rows share their question with a row that answers otherwise.")
    if leaks := profile.faults.get("leak"):
        warnings.append(f"{leaks} rows were taken out of training: their question is held out.")
    if profile.near and profile.near["answered_otherwise"]:
        count = profile.near["answered_otherwise"]
        warnings.append(f"{count} rows ask almost what another row of their split asks, and are answered otherwise.")
    if staged.kinds.too_many:
        warnings.append("The JSON answers have too many different fields: no schema was inferred.")
    if profile.quarantined:
        warnings.append(f"{profile.quarantined} rows are in quarantine.jsonl. {profile.top_reasons()}")
    return warnings


def _of_intents(config: IngestConfig, profile: Profile) -> list[str]:
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
    rare = {name: count for name, count in intents.items() if count < RARE}
    if rare:
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(rare.items(), key=lambda item: item[1])[:5])
        warnings.append(f"{len(rare)} intents have fewer than {RARE} training rows: {shown}. Add some, or merge them.")
    most = max(intents, key=lambda name: intents[name])
    least = min(intents, key=lambda name: intents[name])
    if intents[most] >= UNEVEN * intents[least]:
        warnings.append(
            f"Intents are uneven: {intents[most]} training rows of {most}, {intents[least]} of {least}. The rare ones "
            "will be mistaken for the frequent ones."
        )
    folded = Counter(name.strip().casefold().replace("-", "_").replace(" ", "_") for name in intents)
    twins = sorted(name for name in intents if folded[name.strip().casefold().replace("-", "_").replace(" ", "_")] > 1)
    if twins:
        warnings.append(f"Intents that differ in spelling only: {', '.join(map(repr, twins))}. Make them one.")
    return warnings


def _of_lengths(config: IngestConfig, profile: Profile, has_tokenizer: bool) -> list[str]:
    tokens = profile.tokens
    if not has_tokenizer:
        return ["No tokenizer was given: rows over max_length were not looked for."]
    if tokens is None or not tokens.over:
        return []
    done = {"drop": "in quarantine", "cut": "cut (cut.jsonl says which)"}.get(config.over_long, "an error")
    saved = ", ".join(f"{context} tokens would save {count}" for context, count in tokens.saved.items())
    return [f"{tokens.over} rows are longer than max_length={tokens.max_length} tokens and {done}; {saved}."]
