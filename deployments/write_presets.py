"""Writes the presets: full configs, every field with its help as a comment, so that none can go stale.

    python -m deployments.write_presets

What a preset decides stands in `PRESETS`; everything else is the fields' defaults, written out.
"""

import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from flows.ablation import AblationConfig
from flows.audit import AuditConfig
from flows.bakeoff import BakeoffFlowConfig
from flows.config import FlowConfig, PipelineConfig
from flows.quantize import QuantizeConfig

PRESETS_DIR = Path(__file__).parent / "presets"
QUICKSTART = "deployments/quickstart"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

MANUFACTURING: dict[str, Any] = {"train": "data/train.jsonl", "validation": "data/validation.jsonl"}
GEMMA3 = {**MANUFACTURING, "teacher_base": "google/gemma-3-1b-it", "student_base": "google/gemma-3-270m-it"}
QAT = {
    **MANUFACTURING,
    "teacher_base": "google/gemma-3-1b-it-qat-q4_0-unquantized",
    "student_base": "google/gemma-3-270m-it-qat-q4_0-unquantized",
}
GEMMA3N = {**MANUFACTURING, "teacher_base": "google/gemma-3n-E4B-it", "student_base": "google/gemma-3n-E2B-it"}
SMALL_CARD = {"micro_batch_size": 4, "gradient_checkpointing": True}
AT_ONCE = {"micro_batch_size": 32, "loss_chunk_mib": 1024}  # the memory plan takes fewer rows where they do not fit

QUICKSTART_DATA = {"train": f"{QUICKSTART}/data/train.jsonl", "test": f"{QUICKSTART}/data/test.jsonl"}

# Presets of flows other than the pipeline: name: (flow, its config)
FLOWS: dict[str, tuple[str, type[FlowConfig]]] = {
    "audit": ("audit", AuditConfig),
    "quantize": ("quantize", QuantizeConfig),
    "bakeoff": ("bakeoff", BakeoffFlowConfig),
    "ablation": ("ablation", AblationConfig),
}

QUICKSTART_TRAINING: dict[str, Any] = {
    **QUICKSTART_DATA,
    "text": f"{QUICKSTART}/data/general.txt",
    "teacher_base": f"{QUICKSTART}/teacher",
    "student_base": f"{QUICKSTART}/student",
    "teacher": {
        "rank": 32, "alpha": 64, "dropout": 0.2, "learning_rate": 2e-3, "scheduler": "linear",
        "warmup_ratio": 0.04, "max_steps": 260, "batch_size": 16, "micro_batch_size": 16, "max_length": 256,
    },
    "student": {
        "method": "lora", "rank": 32, "alpha": 64, "learning_rate": 3e-3, "scheduler": "linear",
        "warmup_ratio": 0.06, "max_steps": 150, "micro_batch_size": 16, "max_length": 256,
    },
}  # fmt: skip
QUICKSTART_EVALUATION = {"max_new_tokens": 72, "batch_size": 128, "threads": 2}

# name: (what it is for, the settings that differ from the defaults)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": (
        "The quickstart: two tiny Gemma-3 bases and 1 900 manufacturing-audit commands, on a CPU, in minutes.",
        {
            **QUICKSTART_TRAINING,
            "outliers": {"calibration_rows": 64, "measured_rows": 8},
            "evaluate": {
                **QUICKSTART_EVALUATION, "constrained_rows": 32, "latency_rows": 8, "perplexity_rows": 64,
                "text_tokens": 4096,
            },
            "gate": {"student_points": 8},
        },
    ),
    "gemma-3-16gb": (
        "Gemma-3 1B teaches 270M on a 16 GB card. A T4 trains in float16, the residual stream in float32.",
        {**GEMMA3, "teacher": {"method": "qlora", "rank": 32, **SMALL_CARD}, "student": {"micro_batch_size": 16}},
    ),
    "gemma-3-24gb": (
        "Gemma-3 1B teaches 270M on a 24 GB card (3090, 4090, L4): LoRA in bfloat16.",
        {**GEMMA3, "teacher": {"rank": 32}, "student": AT_ONCE},
    ),
    "gemma-3-80gb": (
        "Gemma-3 1B teaches 270M on an 80 GB card (A100, H100): whole batches at once.",
        {**GEMMA3, "teacher": {"rank": 64, "micro_batch_size": 32}, "student": AT_ONCE},
    ),
    "gemma-3-qat-24gb": (
        "The same from Google's quantization-aware checkpoints, whose weights lie near the Q4_0 grid; 24 GB.",
        {**QAT, "teacher": {"rank": 32}, "student": {"learning_rate": 5e-5, **AT_ONCE}},
    ),
    "gemma-3n-16gb": (
        "Gemma 3n E2B, fine-tuned in 4 bits with adapters on attention only; the 16 GB card's limit.",
        {
            **GEMMA3N, "teacher_base": "google/gemma-3n-E2B-it",
            "teacher": {"method": "qlora", "target_modules": ATTENTION, **SMALL_CARD, "micro_batch_size": 1},
            "student": {"method": "lora", "target_modules": ATTENTION, **SMALL_CARD, "micro_batch_size": 1},
        },
    ),
    "gemma-3n-24gb": (
        "Gemma 3n E4B in 4 bits teaches E2B with adapters; 24 GB.",
        {
            **GEMMA3N,
            "teacher": {"method": "qlora", "rank": 32, "target_modules": ATTENTION, **SMALL_CARD},
            "student": {"method": "lora", "rank": 32, "target_modules": ATTENTION, **SMALL_CARD},
        },
    ),
    "gemma-3n-80gb": (
        "Gemma 3n E4B teaches E2B, both with adapters on a bfloat16 base; 80 GB.",
        {**GEMMA3N, "teacher": {"rank": 64}, "student": {"method": "lora", "rank": 64}},
    ),
    "audit": (
        "What would quantization break in the quickstart's two bases, and was it inherited? In a minute, on a CPU.",
        {**QUICKSTART_DATA, "models": {"teacher": f"{QUICKSTART}/teacher", "student": f"{QUICKSTART}/student"}},
    ),
    "quantize": (
        "One model to proven GGUF files. Here the quickstart's student base; give your own model and rows.",
        {
            **QUICKSTART_DATA,
            "model": f"{QUICKSTART}/student",
            "evaluate": QUICKSTART_EVALUATION,
        },
    ),
    "bakeoff": (
        "Every quantization method on one model, beside what the verdict foretold.",
        {
            **QUICKSTART_DATA,
            "model": f"{QUICKSTART}/student",
            "evaluate": {"max_new_tokens": 72, "limit_rows": 64, "latency_rows": 8, "perplexity_rows": 0},
        },
    ),
    "ablation": (
        "The quickstart's student trained four ways: with and without the teacher, on NF4, from a clipped teacher.",
        {**QUICKSTART_TRAINING, "evaluate": {**QUICKSTART_EVALUATION, "latency_rows": 0}},
    ),
}  # fmt: skip


def text(name: str) -> str:
    """The preset as commented YAML; what it sets is checked against the config on the way."""
    about, settings = PRESETS[name]
    flow, config_class = FLOWS.get(name, ("pipeline", PipelineConfig))
    config = config_class.model_validate(settings)
    head = f"# {about}\n# python -m flows.{flow} deployments/presets/{name}.yaml\n"
    return head + "\n".join(_lines(config, 0)) + "\n"


def _lines(model: BaseModel, depth: int) -> list[str]:
    found: list[str] = []
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            purpose = field.description or (type(value).__doc__ or "").split("\n")[0]
            help_ = [f"{indent}# {line}" for line in textwrap.wrap(purpose, 116 - len(indent))]
            found += ["", *help_, f"{indent}{name}:", *_lines(value, depth + 1)]
            continue
        about = [f"{indent}# {line}" for line in textwrap.wrap(field.description or "", 116 - len(indent))]
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            items = [one.model_dump(mode="json", exclude_none=True) for one in value]
            lists = yaml.safe_dump(items, default_flow_style=None, width=200, sort_keys=False).strip()
            found += ["", *about, f"{indent}{name}:", textwrap.indent(lists, indent + "  ")]
            continue
        found += about
        plain = model.model_dump(mode="json", include={name})[name]
        inline = yaml.safe_dump([plain], default_flow_style=True, width=10_000).strip()[1:-1]
        found.append(f"{indent}{name}: {inline}")
    return found


def main() -> None:
    """Writes every preset."""
    for name in PRESETS:
        (PRESETS_DIR / f"{name}.yaml").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
