"""Writes a first config: looks at the rows, the card and the bases, and says only what differs from a preset.

stillhouse init data/train.jsonl
"""

import json
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flows.cards import Card, smallest_card
from flows.config import PipelineConfig
from flows.presets import preset_text, read_preset
from tasks.core.data_files import DATA_SUFFIXES, data_suffix
from tasks.core.model_files import find_defect
from tasks.ingest import IngestConfig

SAMPLED_ROWS = 10_000
BYTES_PER_TOKEN = 2.5  # Gemma's tokenizer on English and JSON has 3 to 4; numbers and codes fewer
TEMPLATE_TOKENS = 20
SIBLINGS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
CARDS = ((60, "80gb"), (20, "24gb"), (0, "16gb"))  # GiB from which on a card counts as one of this size
MINIMUM_ROWS = IngestConfig().minimum_rows


class Rows(NamedTuple):
    """What the data's files say of themselves."""

    train: str
    validation: str | None
    test: str | None
    number: int
    longest_tokens: int


def main(data: str, out: Path, teacher: str | None, student: str | None, force: bool) -> None:
    """The command; exits with what went wrong."""
    try:
        if out.exists() and not force:
            raise ValueError(f"{out} exists: give another name with --out, or --force to overwrite it")
        text = write_config(describe_rows(data), smallest_card(), teacher, student, out.name)
        PipelineConfig.checked(yaml.safe_load(text), str(out))
        out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"stillhouse: {error}")
    print(f"{text}\nWritten to {out}. Next:\n  stillhouse doctor {out}    # checks it against this machine, in seconds")
    print(f"  stillhouse run {out}")


def describe_rows(source: str) -> Rows:
    """Counts and measures the rows, and finds validation and test files beside them. Raises ValueError for no data."""
    if source.startswith(("hub:", "s3://")):
        return Rows(source, None, None, 0, 0)
    train = data = Path(source)
    if data.is_dir():
        names = (f"train{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".json"))
        train = next((data / name for name in names if (data / name).is_file()), data)
    if not train.exists():
        raise ValueError(f"{train} is not there; paths are relative to {Path.cwd()}")
    files = [path for path in train.rglob("*") if path.is_file()] if train.is_dir() else [train]
    if not any(data_suffix(path.name) and path.stat().st_size for path in files):
        raise ValueError(f"{train} holds no rows: give files that end in {', '.join(DATA_SUFFIXES)}, and are not empty")
    evaluation_files = {split: _sibling(train, names) for split, names in SIBLINGS.items()} if train.is_file() else {}
    count, longest = _measure(train)
    return Rows(str(train), evaluation_files.get("validation"), evaluation_files.get("test"), count, longest)


def _sibling(train: Path, names: tuple[str, ...]) -> str | None:
    suffix = "".join(train.suffixes)
    paths = (train.with_name(name + suffix) for name in names)
    return next((str(path) for path in paths if path.is_file() and path != train), None)


def _measure(path: Path) -> tuple[int, int]:
    """Rows, and tokens of the longest of the first ones, by bytes; both 0 for files that are not JSON lines."""
    if not path.is_file() or path.suffix not in (".jsonl", ".ndjson"):
        return 0, 0
    with path.open("rb") as file:
        longest = max((_text_bytes(line) for line in islice(file, SAMPLED_ROWS)), default=0)
    with path.open("rb") as file:
        count = sum(1 for line in file if line.strip())
    return count, math.ceil(longest / BYTES_PER_TOKEN) + TEMPLATE_TOKENS


def _text_bytes(line: bytes) -> int:
    """Bytes of a row's texts, without its keys."""
    try:
        return _size(json.loads(line))
    except ValueError:
        return 0


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value.encode()) if isinstance(value, str) else len(str(value))


def pick_preset(card: Card | None, bases: tuple[str | None, ...]) -> str:
    """The preset of the bases' family for this card; for a 24 GB card where there is none."""
    family = "gemma-3n" if any(_is_gemma3n(base) for base in bases if base) else "gemma-3"
    size = next(name for gib, name in CARDS if card.gib >= gib) if card else "24gb"
    return f"{family}-{size}"


def _is_gemma3n(base: str) -> bool:
    config = Path(base) / "config.json"
    if config.is_file():
        return str(json.loads(config.read_text()).get("model_type", "")).startswith("gemma3n")
    return "gemma-3n" in base


def write_config(rows: Rows, card: Card | None, teacher: str | None, student: str | None, file_name: str) -> str:
    """The config as commented YAML. Raises ValueError for a base that is a broken directory."""
    for base in filter(None, (teacher, student)):
        if Path(base).is_dir() and (problem := find_defect(Path(base))):
            raise ValueError(problem)
    preset = pick_preset(card, (teacher, student))
    below = read_preset(preset)
    machine = f"{card.name}, {card.gib:.0f} GiB" if card else "no CUDA device here: run it on a machine that has one"
    about = preset_text(preset).splitlines()[0].lstrip("# ")
    counted = f"{rows.number:,} rows, the longest about {rows.longest_tokens} tokens" if rows.number else "not counted"
    lines = [
        f"# {counted}; {machine}.",
        f"# Check it with `stillhouse doctor {file_name}`. Every setting: docs/configuration.md",
        f"preset: {preset}  # {about}",
        _line("train", rows.train),
        _line("validation", rows.validation, "a part of train is held back" if rows.validation is None else ""),
        _line("test", rows.test, "a part of train is held back" if rows.test is None else ""),
        _line("teacher_base", teacher or below["teacher_base"], _gate_note(teacher or below["teacher_base"])),
        _line("student_base", student or below["student_base"]),
    ]
    if rows.longest_tokens:
        lines.append(_line("max_length", fitting_length(rows.longest_tokens), "longer rows are left out"))
    if 0 < rows.number < MINIMUM_ROWS:
        lines.append("ingest: {allow_few_rows: true}  # fewer than " + str(MINIMUM_ROWS) + ": expect little")
    lines.append("gguf: [Q8_0, Q4_K_M]  # the files to deliver")
    return "\n".join(lines) + "\n"


def fitting_length(longest: int) -> int:
    """A length that the longest row fits with a fifth to spare, as a power of two from 128 to 8192."""
    return min(8192, max(128, 1 << math.ceil(math.log2(1.2 * longest))))


def _line(name: str, value: Any, note: str = "") -> str:
    text = yaml.safe_dump({name: value}, allow_unicode=True, width=1000).strip()
    return f"{text}  # {note}" if note else text


def _gate_note(base: str) -> str:
    return "gated: accept its licence on the hub and set HF_TOKEN" if base.startswith("google/") else ""
