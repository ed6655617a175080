"""The outlier report as a page to read, and its tables as rows."""

from typing import Any


def top_norms(name: str, tensors: list[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """A model's norms ranked by largest gain, then 99.9th percentile, then mean."""
    norms = [tensor for tensor in tensors if "gain" in tensor]
    norms.sort(key=lambda t: (t["gain"]["max"], t["gain"]["p999"], t["gain"]["mean"]), reverse=True)
    return [{"model": name, "tensor": t["tensor"], **t["gain"], "change": t.get("max_change")} for t in norms[:top]]


def top_tensors(name: str, tensors: list[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """A model's tensors ranked by largest magnitude, norms as the value that multiplies."""
    rows = [
        {
            "model": name,
            "tensor": t["tensor"],
            "max": t["gain"]["max"] if "gain" in t else t["max"],
            "p999": t["gain"]["p999"] if "gain" in t else t.get("p999"),
            "mean": t["gain"]["mean"] if "gain" in t else t.get("mean_abs"),
            "kurtosis": t.get("kurtosis"),
        }
        for t in tensors
    ]
    return sorted(rows, key=lambda row: row["max"], reverse=True)[:top]


def top_errors(name: str, tensors: list[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """A model's matrices ranked by what Q4_0 would cost them."""
    matrices = sorted((t for t in tensors if "error" in t), key=lambda t: t["error"]["q4_0"], reverse=True)
    return [
        {
            "model": name,
            "tensor": t["tensor"],
            "q4_0": t["error"]["q4_0"],
            "q8_0": t["error"]["q8_0"],
            "kurtosis": t.get("kurtosis"),
            "beyond_sigmas": t.get("beyond_sigmas"),
            "worst_column": f"{t['worst_column']['index']} ({t['worst_column']['over_median']:.1f}x the median)",
        }
        for t in matrices[:top]
    ]


def page(models: dict[str, list[dict[str, Any]]], verdicts: list[str], top: int) -> str:
    """Markdown: the verdict, the pictures, and for each model the norms and the matrices that stand out."""
    parts = ["# Outliers", "", *[f"- {sentence}" for sentence in verdicts], ""]
    parts += ["![Norm gains by layer](norms.png)", "", "![Layers by matrix](tensors.png)", ""]
    for name, tensors in models.items():
        parts += [
            f"## {name}",
            "",
            "Norms, as the value that multiplies:",
            "",
            table(top_norms(name, tensors, top)),
            "",
        ]
        parts += ["Relative error of 4-bit and 8-bit blocks, worst matrices first:", ""]
        parts += [table(top_errors(name, tensors, top)), ""]
    return "\n".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a markdown table; numbers with four digits, nothing as a dash."""
    if not rows:
        return "(none)"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
