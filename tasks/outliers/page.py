"""Renders the audit as a markdown page; its tables as rows."""

from typing import Any

from tasks.core.plain_text import markdown
from tasks.outliers.inheritance import growth_text
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX

Numbers = dict[str, Any]


def top_norms(tensors: list[Numbers], top: int) -> list[Numbers]:
    """A model's norms ranked by largest gain, then 99.9th percentile, then mean."""
    norms = [tensor for tensor in tensors if "gain" in tensor]
    norms.sort(key=lambda t: (t["gain"]["max"], t["gain"]["p999"], t["gain"]["mean"]), reverse=True)
    columns = ("max", "p999", "mean", "min", "channel")
    return [
        {"tensor": t["tensor"], **{key: t["gain"][key] for key in columns}, "change": t.get("max_change")}
        for t in norms[:top]
    ]


def top_tensors(name: str, tensors: list[Numbers], top: int) -> list[Numbers]:
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


def top_errors(tensors: list[Numbers], top: int) -> list[Numbers]:
    """A model's matrices ranked by what Q4_0 would cost them, beside every other format."""
    matrices = [tensor for tensor in tensors if "q4_0" in tensor.get("error", {})]
    matrices.sort(key=lambda tensor: tensor["error"]["q4_0"], reverse=True)
    return [
        {
            "tensor": t["tensor"],
            **{kind: f"{error:.2%}" for kind, error in t["error"].items()},
            "q4_k is": t["becomes"]["q4_k"],
            "q4_0, of the output": f"{t['output_error']['q4_0']:.2%}" if "output_error" in t else None,
            "kurtosis": t.get("kurtosis"),
            "worst column": f"{t['worst_column']['index']} ({t['worst_column']['over_median']:.1f}x the median)",
        }
        for t in matrices[:top]
    ]


def layer_rows(activations: Numbers) -> list[Numbers]:
    """The residual stream by layer: its peak with token and channel, and how much the first token is a sink."""
    rows = []
    for layer in activations["layers"]:
        peak = max(layer["middle"], layer["output"], key=lambda peak: peak["value"])
        rows.append({
            "layer": layer["layer"],
            "peak": peak["value"],
            "float16 has room for": f"{FLOAT16_MAX / max(peak['value'], 1e-9):.3g}x",
            "float8 (448)": f"{FLOAT8_MAX / max(peak['value'], 1e-9):.3g}x",
            "token": f"`{peak['token']!r}` at {peak['position']}",
            "channel": peak["channel"],
            "attention to the first token": f"{layer['sink_mass']:.1%}",
            "its norm over the median": f"{layer['sink_norm']:.1f}x",
        })  # fmt: skip
    return rows


def growth_rows(verdicts: dict[str, Numbers]) -> list[Numbers]:
    """The outliers of each model whose base was audited too, in the base and in the model."""
    rows = []
    for name, verdict in verdicts.items():
        if "inherited" in verdict:
            comparison = verdict["inherited"]
            row: Numbers = {"model": name, "base": comparison["base"]}
            for key, ratio in comparison["ratios"].items():
                before, after = comparison["before"][key], comparison["now"][key]
                row[key.replace("_", " ")] = f"{before:.4g} to {after:.4g} ({growth_text(ratio)})"
            rows.append({**row, "amplified": "yes" if comparison["amplified"] else "no"})
    return rows


def target_rows(targets: dict[str, Numbers]) -> list[Numbers]:
    """The verdict of one model by target."""
    return [
        {
            "target": name,
            "deployed as": assessment["title"],
            "verdict": assessment["verdict"],
            **{key: "; ".join(assessment[key]) for key in ("because", "do")},
        }
        for name, assessment in targets.items()
    ]


def page(
    models: dict[str, list[Numbers]],
    activations: dict[str, Numbers],
    verdicts: dict[str, Numbers],
    sentences: list[str],
    top: int,
) -> str:
    """Markdown: the verdict by target, the pictures, and for each model what stands out."""
    parts = ["# Outliers", "", *[f"- {sentence}" for sentence in sentences], ""]
    if growths := growth_rows(verdicts):
        parts += ["## Inherited or amplified", "", table(growths), ""]
    for name, verdict in verdicts.items():
        parts += [f"## {name}: where it is safe", "", table(target_rows(verdict["targets"])), ""]
        if verdict["outcomes"]:
            rows = [{"tried": trial, **outcome} for trial, outcome in verdict["outcomes"].items()]
            parts += ["Tried on held-out rows, against the model in float32:", "", table(rows), ""]
    parts += ["## Pictures", "", "![Norm gains by layer](norms.png)", "", "![Histogram of gains](gains.png)", ""]
    parts += ["![Layers by matrix](tensors.png)", ""]
    parts += ["![Headroom of the residual stream](stream.png)", ""] if activations else []
    for name, tensors in models.items():
        parts += [f"## {name}", "", "Norms, as the value that multiplies:", "", table(top_norms(tensors, top)), ""]
        parts += ["Relative error of each format, worst matrices first:", "", table(top_errors(tensors, top)), ""]
        if name in activations:
            parts += ["The residual stream on calibration rows:", "", table(layer_rows(activations[name])), ""]
    return "\n".join(parts)


def table(rows: list[Numbers]) -> str:
    """Rows as a markdown table; numbers with four digits, None as a dash."""
    if not rows:
        return "(none)"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else markdown(value)
