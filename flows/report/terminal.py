"""The end of a run in the terminal: the table of models, the gate, and the lines that open the page and the servers."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table

RATES = ["json_valid", "intent_accuracy", "exact_match", "out_of_scope_recall"]


def show(summary: dict[str, Any]) -> None:
    """The table in the terminal, the gate, and the lines that open Prefect and MLflow on this run."""
    table = Table(title="Every model on the held-out rows")
    for column in ["model", "format", "MB", "JSON valid", "intent", "exact match", "out-of-scope recall", "tokens/s"]:
        table.add_column(column, justify="left" if column in ("model", "format") else "right")
    for row in summary["models"]:
        table.add_row(row["name"], *cells(row))
    Console(width=max(Console().width, 110)).print(table)  # into a file or a narrow window it must not be cut
    if summary.get("gate"):
        print(f"Gate:     {'passed' if summary['gate']['passed'] else 'FAILED'}: {summary['gate']['said']}")
    made = sum(not stage["cached"] for stage in summary["stages"])
    seconds = sum(stage["seconds"] for stage in summary["stages"])
    print(f"{made} stages run, {len(summary['stages']) - made} from the cache, {seconds:.0f} s")
    print(f"Report:   {summary['report']}/index.html")
    server = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    open_prefect = f"{server or 'http://127.0.0.1:4200'}/runs/flow-run/{summary['flow_run_id']}"
    print(f"Prefect:  {'' if server else 'make prefect-ui   then open '}{open_prefect}")
    remote = os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")
    print(
        f"MLflow:   {'' if remote else 'make mlflow-ui    then open '}{summary['mlflow_link'] or 'was not reachable'}"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """Format, megabytes, rates and speed of one model, as text."""
    rates = ["-" if row[rate] is None else f"{100 * row[rate]:.1f} %" for rate in RATES]
    return [row["format"], f"{row['bytes'] / 1e6:.2f}", *rates, f"{row['tokens_per_second']:.0f}"]
