"""The outlier report as a page to read, and its tables as rows."""

from typing import Any

from tasks.outliers.inheritance import grew
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX

Numbers = dict[str, Any]


def top_norms(tensors: list[Numbers], top: int) -> list[Numbers]:
    """A model's norms ranked by largest gain, then 99.9th percentile, then mean."""
    norms = [tensor for tensor in tensors if "gain" in tensor]
    norms.sort(key=lambda t: (t["gain"]["max"], t["gain"]["p999"], t["gain"]["mean"]), reverse=True)
    shown = ("max", "p999", "mean", "min", "channel")
    return [
        {"tensor": t["tensor"], **{key: t["gain"][key] for key in shown}, "change": t.get("max_change")}
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


def layer_rows(seen: Numbers) -> list[Numbers]:
    """The residual stream by layer: its peak and where, and the first token's part."""
    rows = []
    for one in seen["layers"]:
        peak = max(one["middle"], one["output"], key=lambda place: place["value"])
        rows.append({
            "layer": one["layer"],
            "peak": peak["value"],
            "float16 has room for": f"{FLOAT16_MAX / max(peak['value'], 1e-9):.3g}x",
            "float8 (448)": f"{FLOAT8_MAX / max(peak['value'], 1e-9):.3g}x",
            "token": f"`{peak['token']!r}` at {peak['position']}",
            "channel": peak["channel"],
            "attention to the first token": f"{one['sink_mass']:.1%}",
            "its norm over the median": f"{one['sink_norm']:.1f}x",
        })  # fmt: skip
    return rows


def growth_rows(judged: dict[str, Numbers]) -> list[Numbers]:
    """Each model that has its base here: what its outliers were there, what they are, and whether that is more."""
    rows = []
    for name, said in judged.items():
        if "inherited" in said:
            grown = said["inherited"]
            row: Numbers = {"model": name, "base": grown["base"]}
            for what, ratio in grown["ratios"].items():
                numbers = f"{grown['before'][what]:.4g} to {grown['now'][what]:.4g} ({grew(ratio)})"
                row[what.replace("_", " ")] = numbers
            rows.append({**row, "amplified": "yes" if grown["amplified"] else "no"})
    return rows


def page(
    models: dict[str, list[Numbers]],
    observed: dict[str, Numbers],
    judged: dict[str, Numbers],
    told: list[str],
    top: int,
) -> str:
    """Markdown: the verdict by target, the pictures, and for each model what stands out."""
    parts = ["# Outliers", "", *[f"- {sentence}" for sentence in told], ""]
    if grown := growth_rows(judged):
        parts += ["## Inherited or amplified", "", table(grown), ""]
    for name, said in judged.items():
        parts += [f"## {name}: where it is safe", ""]
        parts += [table([
            {"target": target, "verdict": one["verdict"], **{key: "; ".join(one[key]) for key in ("because", "do")}}
            for target, one in said["targets"].items()
        ]), ""]  # fmt: skip
        if said["outcomes"]:
            rows = [{"tried": what, **outcome} for what, outcome in said["outcomes"].items()]
            parts += ["Tried on held-out rows, against the model in float32:", "", table(rows), ""]
    parts += ["## Pictures", "", "![Norm gains by layer](norms.png)", "", "![Histogram of gains](gains.png)", ""]
    parts += ["![Layers by matrix](tensors.png)", ""]
    parts += ["![Headroom of the residual stream](stream.png)", ""] if observed else []
    for name, tensors in models.items():
        parts += [f"## {name}", "", "Norms, as the value that multiplies:", "", table(top_norms(tensors, top)), ""]
        parts += ["Relative error of each format, worst matrices first:", "", table(top_errors(tensors, top)), ""]
        if name in observed:
            parts += ["The residual stream on calibration rows:", "", table(layer_rows(observed[name])), ""]
    return "\n".join(parts)


def table(rows: list[Numbers]) -> str:
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
