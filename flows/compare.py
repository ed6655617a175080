"""Two runs side by side: every model's scores, how they differ, and whether the rows show it.

python -m flows.compare RUN_A RUN_B

A run is a directory below .stillhouse/reports (or its name there, `latest` too), or the id of a flow run in MLflow.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tasks.core.errors import BadConfig, BadData, StageError
from tasks.core.mlflow_report import download_report
from tasks.core.paired_comparison import Paired, compare, read_predictions, same_rows
from tasks.core.settings import Settings

CHECKS = ["exact_match", "intent_accuracy", "json_valid", "schema_valid", "token_f1", "rouge_l", "metric"]
FACTS = {"bytes": "bytes", "tokens_per_second": "tokens/s", "latency_p50_ms": "answer p50, ms",
         "held_out_perplexity": "perplexity, answers", "general_perplexity": "perplexity, text"}  # fmt: skip


class Compared(NamedTuple):
    """One model in both runs: paired comparisons on the rows they share, and facts as (name, a, b)."""

    model: str
    paired: list[Paired]
    facts: list[tuple[str, float, float]]


def compare_runs(a: Path, b: Path) -> list[Compared]:
    """Every model that both runs evaluated. Raises BadData when there is none, or their rows are different ones."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    theirs = {row["name"] for row in summaries[1]["models"]}
    names = [row["name"] for row in summaries[0]["models"] if row["name"] in theirs]
    if not names:
        raise BadData(f"{a} and {b} have no model of the same name")
    found = []
    for name in names:
        pairs = same_rows(*(read_predictions(run / "predictions" / f"{name}.jsonl") for run in (a, b)))
        paired = [one for check in CHECKS if (one := compare(pairs, check))]
        ours, others = (summary["evaluations"][name] for summary in summaries)
        both = [(title, ours[key], others[key]) for key, title in FACTS.items() if key in ours and key in others]
        found.append(Compared(name, paired, both))
    return found


def find_run(run: str, scratch: Path, settings: Settings) -> Path:
    """The report directory of a run named by path, by name or by MLflow's id. Raises BadConfig when there is none."""
    for directory in (Path(run), settings.root / "reports" / run):
        if (directory / "summary.json").is_file():
            _require_predictions(directory)
            return directory
    try:
        directory = download_report(run, scratch, settings.tracking_uri)
    except BadConfig as error:
        raise BadConfig(
            f"{run!r} is no directory with a summary.json, no run below {settings.root / 'reports'}, and {error}"
        ) from error
    _require_predictions(directory)
    return directory


def _require_predictions(directory: Path) -> None:
    if not (directory / "predictions").is_dir():
        raise BadData(f"{directory} was written before runs kept their predictions: run the pipeline again")


def show(compared: list[Compared], names: tuple[str, str], console: Console) -> None:
    """A table of the rates and a table of the facts."""
    table = Table(title=f"{names[0]} -> {names[1]}")
    for column in ("model", "score", "rows", names[0], names[1], "difference", "95 % interval", "better/worse", "p"):
        table.add_column(column, justify="left" if column in ("model", "score") else "right")
    for one in compared:
        for place, paired in enumerate(one.paired):
            table.add_row("" if place else one.model, *_cells(paired))
    console.print(table)
    facts = Table(title="Sizes, speeds, perplexities")
    for column in ("model", "", *names, "times"):
        facts.add_column(column, justify="left" if column in ("model", "") else "right")
    for one in compared:
        for place, (title, a, b) in enumerate(one.facts):
            facts.add_row("" if place else one.model, title, f"{a:,.6g}", f"{b:,.6g}", f"{b / a:.3f}" if a else "-")
    console.print(facts)


def _cells(paired: Paired) -> list[str]:
    sure = "[red]" if paired.high < 0 else "[green]" if paired.low > 0 else ""
    return [
        paired.check, str(paired.rows), f"{paired.a:.1%}", f"{paired.b:.1%}", f"{sure}{100 * paired.difference:+.1f}",
        f"{100 * paired.low:+.1f} to {100 * paired.high:+.1f}", f"{paired.better}/{paired.worse}", f"{paired.p:.2g}",
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    """The command; exits with what went wrong."""
    if len(arguments) != 2:
        sys.exit("usage: python -m flows.compare RUN_A RUN_B   (names below .stillhouse/reports, or MLflow run ids)")
    settings = Settings()
    try:
        with ExitStack() as stack:
            scratch = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in arguments]
            runs = [find_run(run, place, settings) for run, place in zip(arguments, scratch, strict=True)]
            compared = compare_runs(*runs)
        names = _short(arguments)
        show(compared, names, Console(width=max(Console().width, 110)))
    except (StageError, ValueError, OSError) as error:
        sys.exit(f"stillhouse: {error}")


def _short(arguments: list[str]) -> tuple[str, str]:
    a, b = (Path(run).name[:24] or run for run in arguments)
    return (a, b) if a != b else (a + " (a)", b + " (b)")


if __name__ == "__main__":
    main(sys.argv[1:])
