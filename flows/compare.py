"""Compares two runs: every model's scores, their differences with intervals and tests, sizes and speeds.

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
from rich.markup import escape
from rich.table import Table

from tasks.core.errors import BadConfig, BadData, StageError
from tasks.core.metrics import paired_metrics, primary_metric
from tasks.core.metrics.measurements import COMPARED
from tasks.core.mlflow_report import download_report
from tasks.core.paired_comparison import Paired, compare, read_predictions, same_rows
from tasks.core.plain_text import visible
from tasks.core.settings import Settings


class ModelComparison(NamedTuple):
    """One model in both runs: paired comparisons on the rows they share, and facts as (title, a, b)."""

    model: str
    paired: list[Paired]
    facts: list[tuple[str, float, float]]


def compare_runs(a: Path, b: Path) -> list[ModelComparison]:
    """Compares every model that both runs evaluated. Raises BadData when there is none, or the rows are different."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    b_names = {row["name"] for row in summaries[1]["models"]}
    names = [row["name"] for row in summaries[0]["models"] if row["name"] in b_names]
    if not names:
        raise BadData(f"{a} and {b} have no model of the same name")
    comparisons = []
    for name in names:
        pairs = same_rows(*(read_predictions(run / "predictions" / f"{name}.jsonl") for run in (a, b)))
        a_facts, b_facts = (summary["evaluations"][name] for summary in summaries)
        checks = sorted(paired_metrics(), key=lambda check: check != primary_metric(a_facts))  # the main one first
        paired = [comparison for check in checks if (comparison := compare(pairs, check))]
        facts = [
            (fact.title, a_facts[fact.name], b_facts[fact.name])
            for fact in COMPARED
            if fact.name in a_facts and fact.name in b_facts
        ]
        comparisons.append(ModelComparison(name, paired, facts))
    return comparisons


def find_run(run: str, scratch: Path, settings: Settings) -> Path:
    """The report directory of a run named by path, by name or by MLflow's id. Raises BadConfig when there is none."""
    for directory in (Path(run), settings.root / "reports" / run):
        if (directory / "summary.json").is_file():
            _require_predictions(directory)
            return directory
    try:
        directory = download_report(run, scratch, settings.tracking_uri)
    except BadConfig as error:
        names = sorted(path.parent.name for path in settings.root.glob("reports/*/summary.json"))
        listed = f"runs there: {', '.join(names)}" if names else "there is none yet: stillhouse run my.yaml makes one"
        raise BadConfig(
            f"{run!r} is no directory with a summary.json, no run below {settings.root / 'reports'} ({listed}), "
            f"and {error}"
        ) from error
    _require_predictions(directory)
    return directory


def _require_predictions(directory: Path) -> None:
    if not (directory / "predictions").is_dir():
        raise BadData(f"{directory} was written before runs kept their predictions: run the pipeline again")


def show(comparisons: list[ModelComparison], names: tuple[str, str], console: Console) -> None:
    """Prints a table of the scores and one of sizes, speeds and perplexities."""
    names = escape(visible(names[0])), escape(visible(names[1]))
    table = Table(title=f"{names[0]} -> {names[1]}")
    for column in ("model", "score", "rows", names[0], names[1], "difference", "95 % interval", "better/worse", "p"):
        table.add_column(column, justify="left" if column in ("model", "score") else "right")
    for comparison in comparisons:
        for line, paired in enumerate(comparison.paired):
            table.add_row("" if line else escape(visible(comparison.model)), *_cells(paired))
    console.print(table)
    facts = Table(title="Sizes, speeds, perplexities")
    for column in ("model", "", *names, "times"):
        facts.add_column(column, justify="left" if column in ("model", "") else "right")
    for comparison in comparisons:
        for line, (title, a, b) in enumerate(comparison.facts):
            facts.add_row(
                "" if line else escape(visible(comparison.model)),
                title,
                f"{a:,.6g}",
                f"{b:,.6g}",
                f"{b / a:.3f}" if a else "-",
            )
    console.print(facts)


def _cells(paired: Paired) -> list[str]:
    colour = "[red]" if paired.high < 0 else "[green]" if paired.low > 0 else ""
    return [
        paired.check, str(paired.rows), f"{paired.a:.1%}", f"{paired.b:.1%}", f"{colour}{100 * paired.difference:+.1f}",
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
            runs = [find_run(run, directory, settings) for run, directory in zip(arguments, scratch, strict=True)]
            comparisons = compare_runs(*runs)
        names = _short(arguments)
        show(comparisons, names, Console(width=max(Console().width, 110)))
    except (StageError, ValueError, OSError) as error:
        sys.exit(f"stillhouse: {error}")


def _short(arguments: list[str]) -> tuple[str, str]:
    a, b = (Path(run).name[:24] or run for run in arguments)
    return (a, b) if a != b else (a + " (a)", b + " (b)")


if __name__ == "__main__":
    main(sys.argv[1:])
