"""Other architectures than the text-only Gemma 3: random weights of published shapes in the training loop on a GPU.

    python -m tests.benchmarks.architectures [--only "Gemma 3n"] [--pico]

LoRA r=32 on all linear layers (not the towers'), and the same on NF4; 4 x 1024 tokens at once, half with a label, ten
steps, with recompute, not compiled. Speed is the median step's; predicted and measured GiB as tests.benchmarks.memory
tells them.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.memory.__main__ import shape, table
from tasks.engine.memory.model_sizes import sizes_of
from tasks.engine.memory.predict import predict
from tasks.engine.memory.workload import workload_of
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.spec import TrainingSpec
from tasks.teacher.run import objective
from tests.benchmarks.memory import GIB, Case, UnsavedLoop, config_of

STEPS, ROWS, LENGTH = 10, 4, 1024
PICO = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 128}


def gemma_3n_e2b(pico: bool) -> PreTrainedModel:
    """The text model of Gemma 3n E2B: hidden 2048, 30 layers, 262 400 pieces, embeddings for each layer."""
    small = PICO | {"vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16}
    real = {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10}
    return Gemma3nForCausalLM(Gemma3nTextConfig(**(small if pico else real), layer_types=None))


def gemma_3_4b(pico: bool) -> PreTrainedModel:
    """Gemma 3 4B with its SigLIP tower."""
    text = shape("4B")
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    if pico:
        text.hidden_size, text.num_hidden_layers, text.vocab_size, text.intermediate_size = 64, 2, 512, 128
        text.layer_types = text.layer_types[:2]
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = SiglipVisionConfig(**sizes, image_size=28 if pico else 896, patch_size=14)
    tokens = {"mm_tokens_per_image": 4 if pico else 256, "boi_token_index": 6, "eoi_token_index": 7}
    config = Gemma3Config(text_config=text.to_dict(), vision_config=tower.to_dict(), image_token_index=8, **tokens)
    return Gemma3ForConditionalGeneration(config)


def llama_1b(pico: bool) -> PreTrainedModel:
    """Llama 3.2 1B."""
    real = {"hidden_size": 2048, "num_hidden_layers": 16, "vocab_size": 128256, "intermediate_size": 8192}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**(PICO if pico else real), **heads, tie_word_embeddings=True))


def qwen3_1b(pico: bool) -> PreTrainedModel:
    """Qwen3 1.7B."""
    real = {"hidden_size": 2048, "num_hidden_layers": 28, "vocab_size": 151936, "intermediate_size": 6144}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    return Qwen3ForCausalLM(Qwen3Config(**(PICO if pico else real), **heads, tie_word_embeddings=True))


MODELS: dict[str, Callable[[bool], PreTrainedModel]] = {
    "Gemma 3n E2B": gemma_3n_e2b,
    "Gemma 3 4B with tower": gemma_3_4b,
    "Llama 3.2 1B": llama_1b,
    "Qwen3 1.7B": qwen3_1b,
}


def run(name: str, base: ModelDir, method: Literal["lora", "qlora"], work: Path, pico: bool) -> dict[str, str]:
    """A row of the table."""
    length, cuda = 32 if pico else LENGTH, torch.cuda.is_available()
    more = {"target_modules": "all-linear", "max_steps": STEPS, "learning_rate": 1e-3}
    case = Case(name, method, ROWS, length, True)
    config = config_of(case, **more)
    predicted = predict(sizes_of(base, config, method), workload_of(config, method, ROWS * length, ROWS * length // 2))
    ids = torch.randint(10, 500, (ROWS * STEPS, length), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Example(row, [IGNORE] * (length // 2) + row[length // 2 :]) for row in ids]
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss = objective(config.loss_chunk_mib << 20)
    spec = TrainingSpec(
        lambda: trainable_model(config, method, base, pick_device()), rows, [], loss, config, Job(work), "run"
    )
    loop = UnsavedLoop(spec)
    loop.run()
    told, losses = loop.reporter.meter.summary(), loop.history.steps["loss"]
    measured = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    packed = loop.model.config.get_text_config()._attn_implementation  # type: ignore[union-attr, operator]
    del loop
    gc.collect()
    return {
        "case": f"{name}, {method}",
        "ms a step": f"{told['seconds_per_step'] * 1e3:.1f}",
        "tokens/s": f"{told['tokens_per_second']:.0f}",
        "predicted": f"{predicted.peak:.2f}",
        "measured": f"{measured:.2f}",
        "loss": f"{losses[0]:.3f} to {losses[-1]:.3f}",
        "attention": packed,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--pico", action="store_true", help="tiny shapes, to try the script on a CPU")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if torch.cuda.is_available() else None) as directory:
        for name in arguments.only:
            base = ModelDir(Path(directory) / "base")
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            with torch.device(pick_device()):
                MODELS[name](arguments.pico).save_pretrained(base.base)
            torch.set_default_dtype(default)
            gc.collect()
            for method in ("lora", "qlora"):
                try:
                    rows.append(run(name, base, method, Path(directory) / "work", arguments.pico))  # type: ignore[arg-type]
                    print(json.dumps(rows[-1]), flush=True)
                except (RuntimeError, ValueError) as error:
                    print(f"{name}, {method}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                shutil.rmtree(Path(directory) / "work", ignore_errors=True)
            shutil.rmtree(base.base)
    print(table(rows))


if __name__ == "__main__":
    main()
