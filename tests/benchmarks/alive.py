"""What keeps a run alive, on a GPU: out of memory under a lid, float16 beyond 65504, divergence; and the loop's cost.

    python -m tests.benchmarks.alive memory      # a lid of CAP_MIB on the card, and the memory fallback levels below it
    python -m tests.benchmarks.alive float16     # losses in float32, bfloat16, float16 and plain float16
    python -m tests.benchmarks.alive trainer     # a step of the training loop beside the same step in a bare loop
    python -m tests.benchmarks.alive nan         # a run whose 5th step breaks, again and again

`--pico` shrinks the shapes, to try it on a CPU.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tasks.core import child_process
from tasks.core.errors import BadConfig, Diverged, OutOfMemory
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.collator import collate, to_device
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.load import load_model
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.objective import Objective
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.train import train
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import objective
from tests.benchmarks.memory import Case, base_of, config_of, loop_of
from tests.benchmarks.processes import rows_of
from tests.pico import pico_tokenizer
from tests.planted import plant
from tests.rows import write_rows


def memory(directory: Path, pico: bool) -> None:
    """The command under a lid, through the memory fallback levels; losses beside those of a run without a lid."""
    base = base_of("270M", directory, pico)
    pico_tokenizer(base.base)
    text = "Close audit 17 for the north hall, and report the pressure of line 4. " * (1 if pico else 12)
    rows = [Row(messages=[Message(role="user", content=f"{n} {text}"), Message(role="assistant", content=text)])
            for n in range(16)]  # fmt: skip
    (directory / "dataset").mkdir()
    write_rows(directory / "dataset" / "train.jsonl", rows)
    settings = dict(method="full", batch_size=4, micro_batch_size=2, max_steps=4, save_every_steps=1, memory_gib="off",
                    learning_rate=1e-4, compile="off")  # fmt: skip
    losses = {}
    for name, cap in (("lid", os.environ.get("CAP_MIB", "5400")), ("none", "130000")):
        config, work = directory / "config.json", directory / name
        config.write_text(FineTuneConfig(**settings).model_dump_json())
        arguments = [str(config), "--base", str(base.base), "--dataset", str(directory / "dataset"), "--out"]
        arguments += [str(directory / f"{name}-out"), "--work", str(work)]
        steps: dict[int, float] = {}

        def on_event(event: dict[str, Any], steps: dict[int, float] = steps) -> None:
            if event["event"] == "metrics" and "grad_norm" in event["values"]:
                steps[event["step"]] = round(event["values"]["loss"], 4)
            elif event["event"] in ("log", "tags"):
                print(f"  {event.get('message') or event['values']}", flush=True)

        os.environ["CAP_MIB"] = cap
        print(f"{cap} MiB:", flush=True)
        for level in range(8):
            try:
                child_process.run_command(
                    "tests.engine.capped", [*arguments, "--memory-level", str(level)], work, on_event, 300, 300
                )
                break
            except OutOfMemory as error:
                print(f"  {str(error)[:300]}", flush=True)
            except BadConfig as error:
                print(f"  gave up: {error}", flush=True)
                break
        losses[name] = steps
    print(json.dumps(losses))


def float16(directory: Path, pico: bool) -> None:
    """A planted model in float32 and float16, and in bfloat16 the model before it was planted: the same function, whose
    final norm, shrunk to gain / k and stored as that less 1, bfloat16 would lose."""
    config = Gemma3TextConfig(
        vocab_size=4096, hidden_size=64 if pico else 640, intermediate_size=128 if pico else 2048, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=32 if pico else 256, sliding_window=512,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "plain")
    base = ModelDir(plant(directory / "plain", directory / "planted", 2.0**14, untie=False))
    rows = rows_of(64, 64 if pico else 512, 4096)
    batch = to_device(collate([(0, rows[0])]), torch.device(pick_device()))
    model = load_model(base, "float32")
    largest: list[float] = []

    def look(module: Any, args: Any, out: Any) -> None:
        largest.append(float((out[0] if isinstance(out, tuple) else out).abs().max()))

    hooks = [layer.register_forward_hook(look) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    print(f"largest value of the residual stream, layer by layer: {[f'{value:.0f}' for value in largest]}")
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), torch.autocast(pick_device(), torch.float16):
        plain = model.to(torch.float16)(input_ids=batch["input_ids"]).logits
    print(f"plain float16: {int((~plain.isfinite()).sum())} of {plain.numel()} logits are not finite")
    del model
    for precision, of in (("float32", base), ("bfloat16", ModelDir(directory / "plain")), ("float16", base)):
        for method, rate in (("lora", 5e-3), ("qlora", 5e-3), ("full", 1e-4)):
            settings = TrainingConfig(
                precision=precision, batch_size=8, micro_batch_size=8, max_steps=8, rank=16, learning_rate=rate,
                compile="off", cuda_graphs="off",
            )  # fmt: skip

            def build(settings: TrainingConfig = settings, method: Any = method, of: ModelDir = of) -> Any:
                return trainable_model(settings, method, of, pick_device())

            job = Job(directory / f"{precision}-{method}")
            spec = TrainingSpec(build, rows, [], objective(settings.loss_chunk_mib << 20), settings, job, "b")
            try:
                _, history = train(spec)
                print(precision, method, [round(loss, 4) for loss in history.steps["loss"]], flush=True)
            except Diverged as error:
                print(precision, method, str(error)[:200], flush=True)


def trainer(directory: Path, pico: bool) -> None:
    """Median seconds of a step, both ways, over the same batches and model."""
    for size, method, rows, length in (("270M", "lora", 4, 256), ("1B", "lora", 8, 1024)):
        case = Case(size, method, rows, 32 if pico else length, False)
        config, base = config_of(case, max_steps=40), base_of(size, directory, pico)
        loop = loop_of(case, config, base, directory / "work")
        loop.run()
        inside = loop.reporter.meter.seconds[10:]
        model, batches = loop.model, [loop.batches[i] for i in range(len(loop.batches))]
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        seconds = []
        for batch in batches:
            start = time.perf_counter()
            batch = to_device(batch, model.device)
            if loop.graphs:
                loop.graphs.begin_step()
                loss = loop.graphs.run(batch).loss
            else:
                loss = loop.loss_sums(batch).loss / len(batch["labels"])
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            values = torch.stack([loss.detach(), norm]).tolist()
            assert all(map(math.isfinite, values))
            optimizer.step()
            model.zero_grad()
            seconds.append(time.perf_counter() - start)
        ours, bare = statistics.median(inside), statistics.median(seconds[10:])
        told = f"{1e3 * ours:.1f} ms a step of the loop, {1e3 * bare:.1f} ms bare"
        print(f"{case}: {told}: {ours / bare - 1:+.1%}", flush=True)


def nan(directory: Path, pico: bool) -> None:
    """The log of a run that breaks at its 5th step, whatever the learning rate."""
    base, config = base_of("270M", directory, pico), config_of(Case("270M", "lora", 4, 256, False), max_steps=8)
    config = config.model_copy(update={"save_every_steps": 2, "cuda_graphs": "off"})
    plain, job = objective(config.loss_chunk_mib << 20), Job(directory / "work")

    def loss_sums(model: Any, batch: Any) -> LossSums:
        sums = plain.loss_sums(model, batch)
        return LossSums(sums.loss * torch.tensor(float("nan"))) if 17 in batch["rows"] else sums

    rows = rows_of(32, 64 if pico else 256, 512)

    def build() -> Any:
        return trainable_model(config, "lora", base, pick_device())

    spec = TrainingSpec(build, rows, [], Objective(loss_sums), config, job, "b")
    try:
        train(spec)
    except Diverged as error:
        print(f"Diverged: {error}")
    for line in (directory / "work" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "log":
            print(f"{event['level']}: {event['message']}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["memory", "float16", "trainer", "nan"])
    parser.add_argument("--pico", action="store_true")
    arguments = parser.parse_args()
    place = "/dev/shm" if torch.cuda.is_available() else None
    with tempfile.TemporaryDirectory(dir=place) as directory:
        {"memory": memory, "float16": float16, "trainer": trainer, "nan": nan}[arguments.act](
            Path(directory), arguments.pico
        )


if __name__ == "__main__":
    main()
