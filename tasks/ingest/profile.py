"""The dataset's profile: counts, intents and their entities, lengths; as JSON, and as a page with pictures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from tasks.core.refs import ModelDir
from tasks.core.rows import read_rows

TOKEN_SAMPLE = 5000
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


class Profile:
    """Counts that grow row by row. `rows` and `intents` are by split, `faults` by verdict, `reasons` as quarantined."""

    def __init__(self, answers: str, shapes: dict[str, str]) -> None:
        self.answers = answers
        self.shapes = shapes
        self.rows: Counter[str] = Counter()
        self.intents: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter(), "test": Counter()}
        self.entities: dict[str, Counter[str]] = {}
        self.faults: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.kept_conflicts = 0
        self.tokens: dict[str, Any] | None = None

    @property
    def quarantined(self) -> int:
        """Lines of quarantine.jsonl."""
        return sum(self.reasons.values())

    def add(self, split: str, canonical: str) -> None:
        """Counts one good row, given as its canonical line."""
        self.rows[split] += 1
        if self.answers != "json":
            return
        row = json.loads(canonical)
        if row["intent"] is None:
            return
        self.intents[split][row["intent"]] += 1
        entities = json.loads(row["messages"][-1]["content"]).get("entities")
        if split == "train" and isinstance(entities, dict):
            self.entities.setdefault(row["intent"], Counter()).update(list(entities))

    def add_quarantine(self, path: Path) -> None:
        """Counts quarantined lines by reason, without the parts of a reason that differ from row to row."""
        with path.open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                reason = _kind(line["reason"])
                self.reasons[reason] += 1
                self.first.setdefault(reason, f"{line['file']}:{line['line']}")

    def top_reasons(self) -> str:
        """The most frequent reasons in a sentence, each with the first row that has it; empty when there is none."""
        found = [f"{count} x {reason} (first: {self.first[reason]})" for reason, count in self.reasons.most_common(3)]
        return f"Most frequent: {'; '.join(found)}." if found else ""

    def count_tokens(self, model: ModelDir, train: Path) -> None:
        """Token lengths of the first rows of train, prompt and answer together, as the model will see them."""
        from tasks.engine.chat import encode, turn_end  # noqa: PLC0415  (only where a tokenizer is given: torch)
        from tasks.engine.load import load_tokenizer  # noqa: PLC0415

        tokenizer = load_tokenizer(model)
        end = turn_end(tokenizer)
        rows = (row for row, _ in zip(read_rows(train), range(TOKEN_SAMPLE), strict=False))
        lengths = pl.Series("tokens", [len(encode(tokenizer, row, end).input_ids) for row in rows])
        self.tokens = {"rows": len(lengths), **_quantiles(lengths)}

    def to_json(self, frame: pl.DataFrame) -> dict[str, Any]:
        """Everything counted; `frame` is the verdicts', for lengths in characters."""
        good = frame.filter(pl.col("fault").is_null())
        return {
            "answers": self.answers,
            "shapes": self.shapes,
            "rows": dict(self.rows),
            "intents": {split: dict(sorted(counts.items())) for split, counts in self.intents.items()},
            "entities": {intent: dict(sorted(keys.items())) for intent, keys in sorted(self.entities.items())},
            "quarantine": dict(self.reasons.most_common()),
            "conflicts_kept": self.kept_conflicts,
            "prompt_characters": _quantiles(good["prompt_chars"]),
            "answer_characters": _quantiles(good["answer_chars"]),
            "tokens": self.tokens,
        }


def write_profile(profile: Profile, frame: pl.DataFrame, out: Path, warnings: list[str]) -> None:
    """Writes profile.json, and report/profile.md with its pictures."""
    found = profile.to_json(frame)
    (out / "profile.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    report = out / "report"
    report.mkdir()
    _plot_lengths(frame.filter(pl.col("fault").is_null()), report / "lengths.png")
    pictures = ["![lengths](lengths.png)"]
    if profile.intents["train"]:
        _plot_intents(profile, report / "intents.png")
        pictures.insert(0, "![intents](intents.png)")
    (report / "profile.md").write_text(_page(found, warnings, pictures), encoding="utf-8")


def _page(found: dict[str, Any], warnings: list[str], pictures: list[str]) -> str:
    lines = ["# Dataset profile", "", "| split | rows |", "|---|---|"]
    lines += [f"| {split} | {found['rows'].get(split, 0)} |" for split in ("train", "validation", "test")]
    lines += [
        "",
        f"Answers: {found['answers']}. Files: {', '.join(f'{k} ({v})' for k, v in found['shapes'].items())}.",
        "",
    ]
    lines += [f"- {warning}" for warning in warnings]
    if found["quarantine"]:
        lines += ["", "| quarantined because | rows |", "|---|---|"]
        lines += [f"| {reason} | {count} |" for reason, count in found["quarantine"].items()]
    if found["entities"]:
        lines += ["", "| intent | training rows | entities |", "|---|---|---|"]
        counts = found["intents"]["train"]
        for intent, count in sorted(counts.items(), key=lambda item: -item[1]):
            keys = ", ".join(f"{key} ({n})" for key, n in found["entities"].get(intent, {}).items())
            lines.append(f"| {intent} | {count} | {keys} |")
    lines += ["", "| length | " + " | ".join(f"p{int(q * 100)}" for q in QUANTILES) + " |", "|---" * 6 + "|"]
    for name in ("prompt_characters", "answer_characters", "tokens"):
        if found[name]:
            values = " | ".join(str(found[name][f"p{int(q * 100)}"]) for q in QUANTILES)
            lines.append(f"| {name.replace('_', ', ')} | {values} |")
    return "\n".join([*lines, "", *pictures, ""])


def _plot_intents(profile: Profile, path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  (a second that failing early should not cost)

    names = [name for name, _ in profile.intents["train"].most_common(40)][::-1]
    figure = Figure(figsize=(8, 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0] * len(names)
    for split, color in zip(profile.intents, ("#33658a", "#86bbd8", "#f6ae2d"), strict=True):
        counts = [profile.intents[split][name] for name in names]
        axes.barh(names, counts, left=left, label=split, color=color)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axes.set(title="Rows of each intent", xlabel="rows", ylabel="intent")
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _plot_lengths(good: pl.DataFrame, path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("prompt", "answer"), strict=True):
        axes.hist(good[f"{name}_chars"].to_numpy(), bins=40, color="#33658a")
        axes.set(title=f"Length of the {name}", xlabel="characters", ylabel="rows")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _quantiles(lengths: pl.Series) -> dict[str, int]:
    return {f"p{int(q * 100)}": int(lengths.quantile(q, "nearest") or 0) for q in QUANTILES}


def _kind(reason: str) -> str:
    for start in (
        "not UTF-8",
        "not JSON",
        "duplicate",
        "the same question is held out",
        "the same question has another",
    ):
        if reason.startswith(start):
            return f"{start} answer" if start.endswith("another") else start
    return reason
