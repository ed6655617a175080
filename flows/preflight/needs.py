"""What a config will need: libraries, disk space, memory plans, and the file of its first rows."""

import json
from collections.abc import Iterator
from pathlib import Path

from flows.flow_config import FlowConfig
from flows.preflight.models import base_models
from tasks.core.data_files import data_suffix
from tasks.core.training_config import TrainingConfig
from tasks.preflight import Check, Training

GB = 1e9
STACK = ("torch", "transformers", "safetensors", "polars", "orjson", "numpy", "matplotlib", "sentencepiece")
TRAINING = ("accelerate", "peft")
LLAMA = ("gguf", "xllamacpp", "cyllama")
FULL_CHECKPOINT = 6.0  # times a bfloat16 model: weights in float32 and two moments of the optimizer
LIMITED = ("8bit", "4bit")


def _trained(config: FlowConfig) -> bool:
    return hasattr(config, "student_base")


def torch_stack(config: FlowConfig | None) -> list[str]:
    """Libraries that the flow's stages import."""
    if config is None:
        return [*STACK, *TRAINING, *LLAMA]
    names = [*STACK, *(TRAINING if _trained(config) else ()), *libraries(config)]
    return [*names, *(["bitsandbytes"] if _uses_bitsandbytes(config) else [])]


def libraries(config: FlowConfig) -> tuple[str, ...]:
    """Libraries with native code, which have to be imported to know that they run here."""
    return LLAMA if hasattr(config, "gguf") else ()


def _uses_bitsandbytes(config: FlowConfig) -> bool:
    groups = [group for name in ("teacher", "student") if (group := getattr(config, name, None)) is not None]
    return any(
        getattr(group, "method", "") == "qlora" or "8bit" in group.optimizer
        or getattr(group, "teacher_precision", "") in LIMITED
        for group in groups
    )  # fmt: skip


def cuda_settings(config: FlowConfig) -> list[str]:
    """Settings that no CPU can follow."""
    named = []
    for name in ("teacher", "student"):
        group = getattr(config, name, None)
        values = {key: getattr(group, key, None) for key in ("optimizer", "teacher_precision", "fp8")}
        needing = {"optimizer": "8bit" in str(values["optimizer"]), "fp8": values["fp8"] is True,
                   "teacher_precision": values["teacher_precision"] in LIMITED}  # fmt: skip
        named += [f"{name}.{key}={values[key]}" for key, needs in needing.items() if needs]
    return named


def trainings(config: FlowConfig) -> dict[str, Training]:
    """The trainings whose memory is planned."""
    planned = {}
    for part in ("teacher", "student") if _trained(config) else ():
        group = getattr(config, part)
        settings = TrainingConfig.model_validate(group.model_dump(include=set(TrainingConfig.model_fields)))
        planned[part] = Training(
            model=part, method=group.method, settings=settings, processes=group.processes,
            teacher_online=getattr(group, "teacher_online", False),
            teacher_precision=getattr(group, "teacher_precision", "auto"),
        )  # fmt: skip
    return planned


def needed_bytes(config: FlowConfig, store_on_disk: bool) -> tuple[float, float]:
    """Bytes that the run writes at least, and about. Models that are not on this machine yet are not counted."""
    sizes = {part: _weights(Path(source).expanduser()) for part, source in base_models(config).items()}
    bases = sum(sizes.values())
    delivered = sizes.get("student", sizes.get("model", 0.0))
    copies = 2.0 if store_on_disk else 1.0  # the store's, and the one that a stage reads
    files = len(getattr(config, "gguf", ())) * delivered * 0.6
    outputs = delivered * (2.0 if _trained(config) else 0.0) + files
    checkpoint = sum(
        2 * FULL_CHECKPOINT * sizes[part] for part in ("teacher", "student")
        if _trained(config) and getattr(config, part).method == "full"
    )  # fmt: skip
    return copies * bases, copies * (bases + outputs) + checkpoint + _teacher_cache(config)


def _weights(directory: Path) -> float:
    return float(sum(path.stat().st_size for path in directory.glob("*.safetensors"))) if directory.is_dir() else 0.0


def check_top_k(config: FlowConfig) -> Iterator[Check]:
    """`top_k` does nothing while the teacher's hidden states stay within their budget."""
    student = getattr(config, "student", None)
    if student is None or student.top_k == type(student).model_fields["top_k"].default:
        return
    likely = _teacher_cache(config)
    if 0 < likely < student.states_budget_gib * 2**30:
        result = f"student.top_k has no effect: the teacher's hidden states are about {likely / GB:.1f} GB"
        yield Check("setting", "warn", result, "remove it, or set student.states_budget_gib below that")


def _teacher_cache(config: FlowConfig) -> float:
    """Hidden states of the teacher in 16 bits for about every second token of the training file."""
    student = getattr(config, "student", None)
    rows, _ = first_file(config)
    model = Path(getattr(config, "teacher_base", "")) / "config.json"
    if student is None or student.teacher_online or rows is None or not model.is_file():
        return 0.0
    document = json.loads(model.read_text())
    width = int(document.get("hidden_size") or document.get("text_config", {}).get("hidden_size", 0))
    return min(float(student.states_budget_gib) * 2**30, rows.stat().st_size / 8 * width * 2)


def first_file(config: FlowConfig) -> tuple[Path | None, Check | None]:
    """A file of the training rows on this disk, whose first rows are looked at; a check where there is none."""
    source = getattr(config, "train", None)
    if source is None:
        return None, None
    if source.startswith(("s3://", "hub:")):
        return None, Check("first rows", "ok", f"{source} is looked at when it is fetched")
    path = Path(source).expanduser()
    path = path.absolute()
    if path.is_file():
        return path, None
    root = Path(path.anchor)
    is_pattern = any(mark in source for mark in "*?[")
    paths = path.rglob("*") if path.is_dir() else root.glob(str(path.relative_to(root))) if is_pattern else ()
    files = [file for file in sorted(paths) if file.is_file() and data_suffix(file.name)]
    if not files:
        return None, Check(
            "first rows",
            "fail",
            f"train: nothing at {path}; paths are relative to {Path.cwd()}",
            "correct the path",
        )
    return next((file for file in files if "train" in file.name), files[0]), None
