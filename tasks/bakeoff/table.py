"""Table and plot of the bake-off's rows, those of GGUF files among them. No torch.

rows = [*bake_rows, *(gguf_row(facts, seconds, imatrix, weighed_tensors) for ...)]
(report / "bakeoff.md").write_text(markdown(rows)); draw(rows, report / "bakeoff.png")
"""

from pathlib import Path
from typing import Any

from tasks.core.audit_words import agreement_verdict
from tasks.core.plain_text import literal_text
from tasks.core.plain_text import markdown as markdown_text

Row = dict[str, Any]
COLUMNS = (
    "method", "dtype", "MB", "seconds", "peak MB", "mean KL", "top-1", "exact", "tokens/s", "predicted", "happened",
)  # fmt: skip


def gguf_row(facts: dict[str, Any], seconds: float, imatrix: bool, weighed_tensors: int, **columns: Any) -> Row:
    """A row from the facts of a GGUF ref (`format`, `bytes`, `mean_kl`, `top1`) and the seconds of its conversion.

    `imatrix` says whether an importance matrix was requested, `weighed_tensors` for how many tensors it was used.
    """
    method = f"GGUF {facts['format']}{' + imatrix' if weighed_tensors else ', imatrix unused' if imatrix else ''}"
    numbers: Row = {key: facts[key] for key in ("bytes", "mean_kl", "top1") if key in facts}
    return {"method": method, "dtype": "float32", "seconds": seconds, "not_finite": 0, **numbers, **columns}


def happened(row: Row) -> str:
    """The measured outcome in the verdict's words, or why there is none."""
    if row.get("skipped"):
        return f"skipped: {row['skipped']}"
    if row.get("failed"):
        return f"failed: {row['failed']}"
    if row.get("not_finite"):
        return f"unsafe: {row['not_finite']:.0f} of {row['tokens']:.0f} tokens NaN or infinite"
    return agreement_verdict({"not_finite": 0} | row)


def table(rows: list[Row]) -> list[Row]:
    """The rows as formatted text by column, smallest KL first, methods that did not run last."""
    return [
        {
            "method": row["method"],
            "dtype": row["dtype"],
            "MB": _scaled(row, "bytes", 1e-6, ".2f"),
            "seconds": _scaled(row, "seconds", 1, ".1f"),
            "peak MB": _scaled(row, "peak_bytes", 1e-6, ".0f"),
            "mean KL": _scaled(row, "mean_kl", 1, ".2g") if not row.get("not_finite") else "-",
            "top-1": _scaled(row, "top1", 100, ".1f", " %"),
            "exact": _scaled(row, "exact", 100, ".1f", " %"),
            "tokens/s": _scaled(row, "tokens_per_second", 1, ".0f"),
            "predicted": row.get("predicted", "-"),
            "happened": happened(row),
        }
        for row in sorted(rows, key=_cost)
    ]


def markdown(rows: list[Row]) -> str:
    """The table as markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return (
        "\n".join(
            [*lines, *("| " + " | ".join(markdown_text(row[name]) for name in COLUMNS) + " |" for row in table(rows))]
        )
        + "\n"
    )


def draw(rows: list[Row], path: Path) -> None:
    """Plots mean KL in each dtype (left) and megabytes (right), a line a method, the best first."""
    with literal_text():
        _draw(rows, path)


def _draw(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - flows import this module
    from matplotlib.figure import Figure  # noqa: PLC0415

    ran = [row for row in rows if "mean_kl" in row]
    finite = [row["mean_kl"] for row in ran if not row.get("not_finite")]
    lowest, highest = max(1e-8, min(finite, default=1e-8)), max([*finite, 1e-2])
    methods = list(dict.fromkeys(row["method"] for row in sorted(ran, key=_cost)))
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(methods)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    colours = {"safe": "seagreen", "risky": "darkorange", "unsafe": "crimson"}
    marks = {"bfloat16": "o", "float16": "^", "float32": "s"}
    for row in ran:
        line, word = methods.index(row["method"]), happened(row).split(":")[0]
        broken = bool(row.get("not_finite"))
        x = 10 * highest if broken else max(row["mean_kl"], lowest)
        left.scatter(x, line, color=colours[word], marker="x" if broken else marks[row["dtype"]], s=36)
        right.barh(line, row["bytes"] / 1e6, color="slategray", height=0.6)
    left.set_xscale("log")
    left.set_yticks(range(len(methods)), methods, fontsize=8)
    left.invert_yaxis()
    left.set(title="mean KL to the model in float32", xlabel="nats a token; a cross at the right: NaN or infinite")
    right.set(title="size", xlabel="megabytes")
    for dtype, mark in marks.items():
        left.scatter([], [], color="gray", marker=mark, label=dtype)
    for word, colour in colours.items():
        left.scatter([], [], color=colour, marker="s", label=word)
    left.legend(fontsize=8, loc="upper right", ncols=2)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _cost(row: Row) -> tuple[bool, float]:
    """Sort key: mean KL, behind it methods that did not run or gave no finite number."""
    return "mean_kl" not in row or bool(row.get("not_finite")), row.get("mean_kl", 0.0)


def _scaled(row: Row, key: str, factor: float, digits: str, unit: str = "") -> str:
    return f"{row[key] * factor:{digits}}{unit}" if key in row else "-"
