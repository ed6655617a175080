"""The profile as one self-contained HTML page with charts, and as Markdown for Prefect."""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tasks.core.plain_text import markdown, visible
from tasks.ingest.charts import draw_charts
from tasks.ingest.profile import QUANTILES, SPLITS, Profile

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td, th { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: left; }
td:not(:first-child) { font-variant-numeric: tabular-nums; }
td:nth-child(5):last-child { min-width: 14rem; }
img { max-width: 100%; background: #fff; border-radius: .5rem; margin: .5rem 0; }
li { margin: .25rem 0; }
"""


MAX_FIELDS = 50  # of those that are not read; profile.json has all


class Section(NamedTuple):
    """A heading, sentences, a table (its head first), and a chart's file name."""

    title: str
    sentences: Sequence[str] = ()
    table: Sequence[Sequence[object]] = ()
    chart: str = ""


def write_profile(profile: Profile, characters: dict[str, dict[int, int]], out: Path, warnings: list[str]) -> None:
    """Writes profile.json, report/profile.html, report/profile.md and the charts.

    `characters` counts good rows by characters of their `prompt` and `answer`.
    """
    (out / "profile.json").write_text(json.dumps(profile.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    report = out / "report"
    report.mkdir(exist_ok=True)
    draw_charts(profile, characters, report)
    sections = [*_sections(profile, warnings)]
    (report / "profile.md").write_text(_markdown(sections), encoding="utf-8")
    (report / "profile.html").write_text(_html(sections, report), encoding="utf-8")


def _sections(profile: Profile, warnings: list[str]) -> Iterator[Section]:
    files = ", ".join(f"{name} ({shape})" for name, shape in list(profile.shapes.items())[:20])
    remainder = f" and {len(profile.shapes) - 20} more" if len(profile.shapes) > 20 else ""
    rows: list[tuple[object, ...]] = [("split", "rows")]
    rows += [(split, profile.rows[split]) for split in (*SPLITS, "calibration")]
    if profile.preference_rows:
        rows.append(("preference", profile.preference_rows))
    yield Section("Rows", [f"Answers: {profile.answers}. Files: {files}{remainder}."], rows)
    if warnings:
        yield Section("Advice", warnings)
    proof = profile.leak_proof
    answers = [(split, count, proof.learnt[split], proof.asked[split]) for split, count in proof.answers.items()]
    yield Section("Leak proof", [proof.sentence()], [("held out", "answers", "learnt", "context learnt"), *answers])
    if profile.unread:
        fields = sorted(profile.unread.items(), key=lambda item: -item[1].rows)[:MAX_FIELDS]
        shares = {name: f"{profile.unread_share(name):.1%}" for name in profile.unread}
        unread = [(name or repr(name), f.rows, shares[name], f.example, f.first) for name, f in fields]
        yield Section("Fields that are not read", table=[("field", "rows", "share", "example", "first"), *unread])
    if profile.reasons:
        reasons = sorted(profile.reasons.items(), key=lambda item: -item[1])
        lines = [(reason, count, profile.first_rows[reason]) for reason, count in reasons]
        yield Section("Quarantine", table=[("reason", "rows", "first"), *lines])
    if profile.intents["train"]:
        yield Section("Intents", table=[*_intents(profile)], chart="intents.png")
    if profile.schema:
        fields = profile.schema["properties"]
        required = profile.schema["required"]
        forms = [(name, _types(field["type"]), "yes" if name in required else "no") for name, field in fields.items()]
        yield Section("Fields of the answers", table=[("field", "type", "required"), *forms])
    lengths = [("length", *(f"p{int(q * 100)}" for q in QUANTILES))]
    for name, quantiles in profile.characters.items():
        lengths.append((f"{name}, characters", *map(str, quantiles.values())))
    sentences = []
    if (tokens := profile.tokens) is not None:
        lengths.append(("tokens", *map(str, (tokens.p0, tokens.p50, tokens.p90, tokens.p99, tokens.p100))))
        sentences.append(f"Token lengths are those of {tokens.sampled} rows; {tokens.counted} rows were counted.")
        sentences += [f"A context of {size} tokens would save {count} rows." for size, count in tokens.saved.items()]
    yield Section("Lengths", sentences, lengths, "lengths.png")


def _types(types: str | list[str]) -> str:
    return types if isinstance(types, str) else " or ".join(types)


def _intents(profile: Profile) -> Iterator[tuple[object, ...]]:
    yield ("intent", *SPLITS, "entities in train")
    for intent, _ in sorted(profile.intents["train"].items(), key=lambda item: -item[1]):
        entities = ", ".join(f"{field} ({count})" for field, count in profile.entities.get(intent, {}).items())
        yield (intent, *(profile.intents[split].get(intent, 0) for split in SPLITS), entities)


def _markdown(sections: list[Section]) -> str:
    lines = ["# Dataset profile"]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        lines += [f"- {markdown(sentence)}" for sentence in section.sentences]
        if section.table:
            head, *rows = ([markdown(cell) for cell in row] for row in section.table)
            lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(r)} |" for r in rows)]
    return "\n".join([*lines, ""])


def _html(sections: list[Section], report: Path) -> str:
    parts = []
    for section in sections:
        parts.append(f"<h2>{section.title}</h2>")
        if section.sentences:
            items = "".join(f"<li>{html.escape(visible(sentence))}</li>" for sentence in section.sentences)
            parts.append(f"<ul>{items}</ul>")
        if section.table:
            head, *rows = ([html.escape(visible(str(cell))) for cell in row] for row in section.table)
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
            parts.append(f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{body}</table>")
        if section.chart:
            data = base64.b64encode((report / section.chart).read_bytes()).decode()
            parts.append(f'<img alt="{section.title}" src="data:image/png;base64,{data}">')
    about = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    title = "<title>Dataset profile</title>"
    return f"<!doctype html><html lang=en><head>{about}{title}</head><body><h1>Dataset profile</h1>{''.join(parts)}"
