"""The bake-off's rows side by side, those of the GGUF stage among them: a table and a plot. No torch.

rows = [*bake_rows, *(gguf_row(report, speed) for ...)]
(report / "bakeoff.md").write_text(markdown(rows)); draw(rows, report / "bakeoff.png")
"""

from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "method", "dtype", "MB", "seconds", "peak MB", "mean KL", "top-1", "exact", "tokens/s", "predicted", "happened",
)  # fmt: skip
GOOD, BEARABLE = (0.05, 0.95), (0.5, 0.8)  # mean KL and top-1, as the outliers stage judges its own trials


def gguf_row(facts: dict[str, Any], seconds: float, imatrix: bool, **more: Any) -> Row:
    """A row from the facts of a GGUF ref (`format`, `bytes`, `mean_kl`, `top1`) and its stage's seconds."""
    method = f"GGUF {facts['format']}{' + imatrix' if imatrix else ''}"
    kept: Row = {key: facts[key] for key in ("bytes", "mean_kl", "top1") if key in facts}
    return {"method": method, "dtype": "float32", "seconds": seconds, "not_finite": 0, **kept, **more}


def happened(row: Row) -> str:
    """What came of it, in the verdict's words."""
    if row.get("skipped"):
        return f"skipped: {row['skipped']}"
    if row.get("failed"):
        return f"failed: {row['failed']}"
    if row.get("not_finite"):
        return f"unsafe: {row['not_finite']:.0f} of {row['tokens']:.0f} tokens NaN or infinite"
    for word, (kl, top1) in (("safe", GOOD), ("risky", BEARABLE)):
        if row["mean_kl"] <= kl and row["top1"] >= top1:
            return word
    return "unsafe"


def table(rows: list[Row]) -> list[Row]:
    """The rows as people read them, smallest KL first, what did not run last."""

    def order(row: Row) -> tuple[bool, float]:
        broken = "mean_kl" not in row or bool(row.get("not_finite"))
        return broken, row.get("mean_kl", 0.0)

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
        for row in sorted(rows, key=order)
    ]


def markdown(rows: list[Row]) -> str:
    """The table as markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in COLUMNS) + " |" for row in table(rows))]) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Bytes against mean KL, both logarithmic; what was not finite or did not run has no place there."""
    import matplotlib  # noqa: PLC0415 - flows import this module

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(10, 6))
    drawn = [row for row in rows if "mean_kl" in row and not row.get("not_finite")]
    colours = {"safe": "seagreen", "risky": "darkorange", "unsafe": "crimson"}
    for row in drawn:
        kl = max(row["mean_kl"], 1e-8)
        marker = "s" if row["method"].startswith("GGUF") else "o"
        axis.scatter(row["bytes"] / 1e6, kl, color=colours[happened(row)], marker=marker)
        axis.annotate(f"{row['method']} {row['dtype']}", (row["bytes"] / 1e6, kl), fontsize=7, xytext=(4, 3),
                      textcoords="offset points")  # fmt: skip
    axis.set(title="What each method costs", xlabel="megabytes", ylabel="mean KL to the model in float32, nats a token")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _scaled(row: Row, key: str, factor: float, digits: str, unit: str = "") -> str:
    return f"{row[key] * factor:{digits}}{unit}" if key in row else "-"
