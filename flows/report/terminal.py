"""The end of a run in the terminal: the table of models, the gate, and the lines that open the page and the servers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.report.page import gate_word
from tasks.core.metrics import Visibility, titles
from tasks.core.plain_text import visible


def show(summary: dict[str, Any]) -> None:
    """The table in the terminal, the gate, and the lines that open Prefect and MLflow on this run."""
    table = Table(title="Every model on the held-out rows")
    columns, *rows = cells(summary)
    for column in columns:
        table.add_column(Text(column), justify="left" if column in ("model", "format") else "right")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    Console(width=max(Console().width, 110)).print(table)  # into a file or a narrow window it must not be cut
    if summary.get("gate"):
        word = gate_word(summary["gate"])
        print(f"Gate:     {word.upper() if word == 'failed' else word}: {visible(str(summary['gate']['said']))}")
    executed = sum(not stage["cached"] for stage in summary["stages"])
    seconds = sum(stage["seconds"] for stage in summary["stages"])
    print(f"{executed} stages run, {len(summary['stages']) - executed} from the cache, {seconds:.0f} s")
    print(f"Report:   {summary['report']}/index.html")
    if names := ", ".join(summary.get("artifacts", {})):
        print(f"Files:    stillhouse fetch {Path(summary['report']).name} NAME DIR    (NAME: {names})")
    server = (get_current_settings().api.url or "").removesuffix("/api")
    open_prefect = f"{server or 'http://127.0.0.1:4200'}/runs/flow-run/{summary['flow_run_id']}"
    # Without a server of its own a run is in the database below PREFECT_HOME, which `make` sets and a shell does not.
    command = "make prefect-ui  " if "PREFECT_HOME" in os.environ else "prefect server start  "
    print(f"Prefect:  {'' if server else command + 'then open '}{open_prefect}")
    remote = os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")
    print(
        f"MLflow:   {'' if remote else 'make mlflow-ui    then open '}{summary['mlflow_link'] or 'was not reachable'}"
    )


def cells(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of models as text: its head, and a row a model with the scores that any of them has."""
    names = set().union(*summary["evaluations"].values())
    scores = {name: title for name, title in titles(Visibility.TERMINAL).items() if name in names}
    table = [["model", "format", "MB", *scores.values(), "tokens/s"]]
    for row in summary["models"]:
        facts = summary["evaluations"][row["name"]]
        values = [f"{100 * facts[name]:.1f} %" if name in facts else "-" for name in scores]
        size, speed = f"{row['bytes'] / 1e6:.2f}", f"{row['tokens_per_second']:.0f}"
        table.append([row["name"], row["format"], size, *values, speed])
    return table
