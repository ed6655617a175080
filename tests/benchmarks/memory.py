"""The memory plan against a GPU: random weights of real shapes through the training loop, a few steps each.

    python -m tests.benchmarks.memory [--only 1B] [--held-out] [--kept] [--json FILE]

Prints predicted and measured GiB (`torch.cuda.max_memory_allocated` over loading and three steps) and their ratio. All
rows have the same length, half of their tokens with a label. `--kept` prints what a layer keeps for its backward, by
width and type, which is where the formula in tasks/engine/memory/predict.py comes from.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Gemma3ForCausalLM

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.memory.__main__ import ALL, shape, table
from tasks.engine.memory.model_sizes import sizes_of
from tasks.engine.memory.predict import CONTEXT_GIB, predict
from tasks.engine.memory.workload import workload_of
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.loop import TrainingLoop
from tasks.engine.training.spec import TrainingSpec
from tasks.teacher.run import objective

GIB = 2**30


class Case(NamedTuple):
    """Rows of `length` tokens, `rows` of them at once."""

    size: str
    method: str
    rows: int
    length: int
    recompute: bool
    more: dict[str, Any] = {}

    def __str__(self) -> str:
        more = "".join(f", {name}={value}" for name, value in self.more.items())
        return f"{self.size} {self.method} {self.rows} x {self.length}{', recompute' if self.recompute else ''}{more}"


MADE_WITH = [
    Case("270M", "full", 8, 1024, False),
    Case("270M", "lora", 16, 512, False),
    Case("270M", "full", 1, 8192, True),
    Case("1B", "lora", 8, 1024, True),
    Case("1B", "lora", 8, 1024, False),
    Case("1B", "lora", 1, 8192, True, {"rank": 64}),
    Case("1B", "qlora", 8, 1024, True),
    Case("1B", "qlora", 4, 512, False),
    Case("1B", "qlora", 2, 2048, False, {"use_dora": True}),
    Case("1B", "full", 4, 1024, True),
    Case("1B", "full", 4, 1024, False),
    Case("1B", "full", 4, 1024, False, {"optimizer": "adamw_8bit"}),
    Case("4B", "lora", 4, 1024, True),
    Case("4B", "lora", 2, 1024, False),
    Case("4B", "qlora", 1, 4096, True, {"rank": 64}),
    Case("4B", "qlora", 8, 512, False),
]
# Looked at only after the formula was settled.
HELD_OUT = [
    Case("270M", "qlora", 4, 2048, False),
    Case("270M", "full", 4, 4096, False, {"optimizer": "paged_adamw_8bit"}),
    Case("1B", "lora", 2, 2048, False, {"use_dora": True, "rank": 16}),
    Case("1B", "lora", 4, 1024, False, {"dropout": 0.05}),
    Case("1B", "lora", 2, 4096, False, {"target_modules": ["q_proj", "v_proj"]}),
    Case("1B", "qlora", 8, 1024, False, {"compile": "on"}),
    Case("1B", "lora", 8, 1024, True, {"compile": "on"}),
    Case("4B", "lora", 8, 1024, False),
    Case("4B", "qlora", 4, 512, True, {"use_dora": True}),
    Case("4B", "full", 1, 512, True, {"optimizer": "paged_adamw_8bit"}),
]
CASES = MADE_WITH + HELD_OUT


class UnsavedLoop(TrainingLoop):
    """The training loop without its last checkpoint, which would take most of the time."""

    def save_checkpoint(self) -> None:
        """Saves nothing."""


def base_of(size: str, directory: Path, pico: bool) -> ModelDir:
    """A random checkpoint of a shape."""
    if not (directory / size / "config.json").exists():
        config = shape(size)
        if pico:
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 64, 128, 2, 512
            config.head_dim, config.layer_types = 32, config.layer_types[:2]
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(pick_device()):
            Gemma3ForCausalLM(config).save_pretrained(directory / size)
        torch.set_default_dtype(default)
    return ModelDir(directory / size)


def config_of(case: Case, **more: Any) -> TrainingConfig:
    """The settings of a case."""
    return TrainingConfig(
        **{
            "rank": 32, "target_modules": ALL, "batch_size": case.rows, "micro_batch_size": case.rows, "max_steps": 3,
            "max_length": case.length, "gradient_checkpointing": case.recompute, "memory_gib": "off", "compile": "off",
            "precision": "bfloat16" if torch.cuda.is_available() else "float32", **case.more, **more,
        }
    )  # fmt: skip


def loop_of(case: Case, config: TrainingConfig, base: ModelDir, work: Path) -> UnsavedLoop:
    """The training loop over random rows."""
    vocabulary = shape(case.size).vocab_size if torch.cuda.is_available() else 512
    ids = torch.randint(
        5, vocabulary, (case.rows * 3, case.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = [Example(row, [IGNORE] * (case.length // 2) + row[case.length // 2 :]) for row in ids]

    def build() -> Any:
        return trainable_model(config, case.method, base, pick_device())

    return UnsavedLoop(
        TrainingSpec(build, rows, [], objective(config.loss_chunk_mib << 20), config, Job(work), "benchmark"), 1.0
    )


def run(case: Case, directory: Path, kept: bool, pico: bool) -> dict[str, str]:
    """A case's row of the table."""
    config, base = config_of(case), base_of(case.size, directory, pico)
    tokens = case.rows * case.length
    load = workload_of(config, case.method, tokens, tokens // 2)
    predicted = predict(sizes_of(base, config, case.method), load)
    cuda, start = torch.cuda.is_available(), time.time()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loop = loop_of(case, config, base, directory / "work")
    loaded = torch.cuda.memory_allocated() / GIB if cuda else 0.0
    if kept:
        with watch(loop):
            loop.run()
    else:
        loop.run()
    measured = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    reserved = torch.cuda.max_memory_reserved() / GIB if cuda else 0.0
    free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
    context = (total - free - torch.cuda.memory_reserved()) / GIB if cuda else CONTEXT_GIB
    row = {
        "case": str(case),
        "predicted": f"{predicted.peak:.2f}",
        "measured": f"{measured:.2f}",
        "ratio": f"{predicted.peak / measured:.3f}" if cuda else "-",
        "reserved": f"{reserved:.2f}",
        "context": f"{context:.2f}",
        "loaded": f"{loaded:.2f}",
        "weights + trained": f"{predicted.weights + predicted.trained:.2f}",
        "activations + working": f"{predicted.activations + predicted.working + predicted.logits:.2f}",
        "loss": f"{loop.history.steps['loss'][-1]:.3f}",
        "s": f"{time.time() - start:.1f}",
    }
    shutil.rmtree(directory / "work", ignore_errors=True)
    del loop
    gc.collect()
    return row


class watch:
    """Counts what autograd saves in one forward of the first micro-batch, each storage once."""

    def __init__(self, loop: UnsavedLoop) -> None:
        self.loop, self.seen, self.sizes = loop, set[int](), Counter[str]()
        model = loop.model
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.own |= {b.untyped_storage().data_ptr() for b in model.buffers()}

    def __enter__(self) -> None:
        loss_sums, done = self.loop.loss_sums, list[bool]()

        def watched(batch: Any) -> Any:
            if done:
                return loss_sums(batch)
            done.append(True)
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
                return loss_sums(batch)

        self.loop.loss_sums = watched  # type: ignore[method-assign]

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called with everything that is saved."""
        place = tensor.untyped_storage().data_ptr()
        if place not in self.seen and place not in self.own:
            self.seen.add(place)
            self.sizes[f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"] += 1
        return tensor

    def __exit__(self, *_: object) -> None:
        layers = self.loop.model.config.get_text_config().num_hidden_layers
        print(f"kept for the backward ({layers} layers):")
        for what, number in self.sizes.most_common(60):
            print(f"  {number:5d} x {what}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this; several with |")
    parser.add_argument("--held-out", action="store_true", help="only cases that the formula was not made with")
    parser.add_argument("--kept", action="store_true")
    parser.add_argument("--pico", action="store_true", help="tiny shapes, to try the script on a CPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    place = "/dev/shm" if torch.cuda.is_available() else None
    cases = HELD_OUT if arguments.held_out else CASES
    wanted = [case for case in cases if any(part in str(case) for part in arguments.only.split("|"))]
    with tempfile.TemporaryDirectory(dir=place) as directory:
        for case in wanted:
            if arguments.pico:
                case = case._replace(length=32)
            try:
                rows.append(run(case, Path(directory), arguments.kept, arguments.pico))
            except (RuntimeError, ValueError) as error:
                print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                gc.collect()
                continue
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
