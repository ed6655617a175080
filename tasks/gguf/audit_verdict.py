"""What the outliers stage's `verdict.json` says to this stage: sensitive tensors, and where a file is not safe."""

import json
from pathlib import Path
from typing import Any

from tasks.engine.runtimes.ggml_names import tensor_names
from tasks.gguf.sensitive import Errors


def verdict_errors(outliers: Path | None, architecture: str, layers: int) -> Errors:
    """The verdict's `sensitive` matrices by llama.cpp's names: relative error of their output in each format.

    Empty without a verdict, or where it saw no activations.
    """
    file = outliers / "verdict.json" if outliers else None
    if file is None or not file.is_file():
        return {}
    verdict: dict[str, Any] = json.loads(file.read_text())
    found = verdict["models"][verdict["focus"]].get("sensitive", [])
    errors = {one["tensor"].removesuffix(".weight"): one["output_error"] for one in found}
    return {name: errors[module] for module, name in tensor_names(errors, architecture, layers).items()}


def verdict_warnings(kind: str, outliers: Path | None) -> list[str]:
    """What the outliers stage's verdict says against serving this kind; of an F16 file also what nobody measured."""
    file = outliers / "verdict.json" if outliers else None
    if file is None or not file.is_file():
        unseen = "F16: Gemma 3's activations can pass float16's 65504, which nobody looked at here: give --outliers DIR"
        return [unseen] if kind == "F16" else []
    verdict: Any = json.loads(file.read_text())
    targets = verdict["models"][verdict["focus"]]["targets"]
    where = {"gguf_cpu": "llama.cpp on a CPU", "gguf_fp16": "a backend that multiplies in float16"}
    if kind == "F16":
        where["fp16"] = "float16"
    found = []
    for target, name in where.items():
        said = targets.get(target, {"verdict": "unknown", "because": [], "do": []})
        if said["verdict"] in ("risky", "unsafe"):
            because, do = "; ".join(said["because"]), "; ".join(said["do"])
            found.append(f"{verdict['focus']} is {said['verdict']} on {name}: {because}{'. ' + do if do else ''}")
    return found
