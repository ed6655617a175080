"""Sensitive tensors and unsafe backends from the outliers stage's `verdict.json`."""

import json
from pathlib import Path
from typing import Any

from tasks.engine.runtimes.ggml_names import tensor_names
from tasks.gguf.sensitive import Errors


def verdict_errors(outliers: Path | None, architecture: str, layers: int) -> Errors:
    """Relative output error in each format of the verdict's sensitive matrices, by llama.cpp's tensor names.

    Empty without a verdict, or for one that measured no activations.
    """
    file = outliers / "verdict.json" if outliers else None
    if file is None or not file.is_file():
        return {}
    verdict: dict[str, Any] = json.loads(file.read_text())
    matrices = verdict["models"][verdict["focus"]].get("sensitive", [])
    errors = {matrix["tensor"].removesuffix(".weight"): matrix["output_error"] for matrix in matrices}
    return {name: errors[module] for module, name in tensor_names(errors, architecture, layers).items()}


def verdict_warnings(kind: str, outliers: Path | None) -> list[str]:
    """Warnings of the verdict for backends that would serve this kind; for F16 also that there is no verdict."""
    file = outliers / "verdict.json" if outliers else None
    if file is None or not file.is_file():
        unmeasured = "F16: Gemma 3's activations can pass float16's 65504, which was not measured: give --outliers DIR"
        return [unmeasured] if kind == "F16" else []
    verdict: Any = json.loads(file.read_text())
    targets = verdict["models"][verdict["focus"]]["targets"]
    backends = {"gguf_cpu": "llama.cpp on a CPU", "gguf_fp16": "a backend that multiplies in float16"}
    if kind == "F16":
        backends["fp16"] = "float16"
    warnings = []
    for target, name in backends.items():
        result = targets.get(target, {"verdict": "unknown", "because": [], "do": []})
        if result["verdict"] in ("risky", "unsafe"):
            reasons, remedies = "; ".join(result["because"]), "; ".join(result["do"])
            remedy = f". {remedies}" if remedies else ""
            warnings.append(f"{verdict['focus']} is {result['verdict']} on {name}: {reasons}{remedy}")
    return warnings
