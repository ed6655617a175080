"""Fine-tuning speed of the teacher's stage on one GPU beside TRL, TRL + Liger and Unsloth, in one run.

    python -m tests.benchmarks.sft table WORK [--only NAME ...]         every contestant of RUNS, and a table of them
    python -m tests.benchmarks.sft run WORK NAME                        one of them

Every contestant fine-tunes the same random checkpoint on the same rows: LoRA r=32 on all seven projections, the whole
step timed. The peers' AdamW has 8-bit state, ours (torch's fused one) float32. Ours is `tasks.teacher.run.fine_tune`
itself, its steps timed from outside; the peers' loops are in sft_peers.py (trl 1.15, liger-kernel, unsloth 2026.10.9).
They warm up side by side and are timed one after another (turns.py). The losses of ours and TRL's are compared first,
step by step, on rows of mixed length. Peak is what the whole run allocated at most.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.sft_shapes import FRAME, SHAPES, quickstart_lengths, write_checkpoint, write_rows
from tests.benchmarks.turns import end_turn, take_turns, wait_for_turn

WARM_UP, TIMED = 6, 16
AWAKE = 2  # first steps of a turn, not counted
STEPS = WARM_UP + TIMED
PROFILED = 3
# name: (who, shape, rows, method, recompute, and what else is set)
RUNS: dict[str, Any] = {
    "curve pico ours": ("ours", "pico", "long", "lora", True),
    "curve pico trl": ("trl", "pico", "long", "lora", True),
    "curve ours": ("ours", "1b", "mixed", "lora", True),
    "curve trl": ("trl", "1b", "mixed", "lora", True),
    "ours bf16": ("ours", "1b", "long", "lora", True),
    "ours bf16 fast": ("ours", "1b", "long", "lora", False),
    "curve fp8 ours": ("ours", "1b", "mixed", "lora", False, {"fp8": True}),
    "ours fp8": ("ours", "1b", "long", "lora", True, {"fp8": True}),
    "ours fp8 fast": ("ours", "1b", "long", "lora", False, {"fp8": True}),
    "ours bf16 no graph": ("ours", "1b", "long", "lora", True, {"cuda_graphs": "off"}),
    "ours bf16 eager": ("ours", "1b", "long", "lora", True, {"compile": "off"}),
    "ours bf16 padded": ("ours", "1b", "long", "lora", True, {"packing": "off"}),
    "ours bf16 fast, no graph": ("ours", "1b", "long", "lora", False, {"cuda_graphs": "off"}),
    "ours nf4": ("ours", "1b", "long", "qlora", True),
    "ours nf4 fast": ("ours", "1b", "long", "qlora", False),
    "unsloth bf16": ("unsloth", "1b", "long", "lora", True),
    "unsloth nf4": ("unsloth", "1b", "long", "qlora", True),
    "trl bf16": ("trl", "1b", "long", "lora", True),
    "trl nf4": ("trl", "1b", "long", "qlora", True),
    "liger bf16": ("liger", "1b", "long", "lora", True),
    "liger nf4": ("liger", "1b", "long", "qlora", True),
    "ours bf16 short": ("ours", "1b", "short", "lora", False),
    "ours fp8 short": ("ours", "1b", "short", "lora", False, {"fp8": True}),
    "unsloth bf16 short": ("unsloth", "1b", "short", "lora", True),
    "liger bf16 short": ("liger", "1b", "short", "lora", True),
    "ours bf16 4b": ("ours", "4b", "long", "lora", True),
    "ours bf16 4b fast": ("ours", "4b", "long", "lora", False),
    "ours nf4 4b": ("ours", "4b", "long", "qlora", True),
    "ours fp8 4b": ("ours", "4b", "long", "lora", True, {"fp8": True}),
    "ours fp8 4b fast": ("ours", "4b", "long", "lora", False, {"fp8": True}),
    "unsloth bf16 4b": ("unsloth", "4b", "long", "lora", True),
    "unsloth nf4 4b": ("unsloth", "4b", "long", "qlora", True),
}
BATCH = {"long": 8, "mixed": 8, "short": 64}


def prepare(work: Path, shape: str, rows: str) -> tuple[Path, Path]:
    """The checkpoint and the rows of a run, made when they are not there."""
    base, dataset = work / shape, work / f"{shape}-{rows}"
    if not (base / "config.json").exists():
        write_checkpoint(base, shape)
    if not (dataset / "train.jsonl").exists():
        size, count = (64 if shape == "pico" else 1024), BATCH[rows] * STEPS
        lengths = [(1, size - FRAME - 1)] * count
        if rows == "short":
            lengths = quickstart_lengths(count)
        if rows == "mixed":
            lengths = [(1 + i % 7, (37 * i) % (size - FRAME - 8) + 1) for i in range(count)]
        write_rows(dataset, lengths, min(SHAPES[shape]["vocab_size"], 8192))
        a_step = sum(prompt + answer + FRAME for prompt, answer in lengths) / STEPS
        (dataset / "tokens.json").write_text(json.dumps({"tokens_a_step": a_step}))
    return base, dataset


def run(work: Path, name: str) -> None:
    """One contestant; writes `NAME.json` with its step times, losses, tokens and peak memory."""
    who, shape, rows, method, recompute, *settings = RUNS[name]
    base, dataset = prepare(work, shape, rows)
    if who == "ours":
        found = run_ours(work, name, base, dataset, BATCH[rows], method, recompute, *settings)
    else:
        from tests.benchmarks.sft_peers import run_peer

        found = run_peer(work, name, who, base, dataset, BATCH[rows], method, recompute, STEPS, WARM_UP, AWAKE, write)
    write(work, name, found)
    seconds = statistics.median(found["seconds"])
    print(
        f"{name}: {seconds * 1e3:.1f} ms, peak {found['peak_gib']:.2f} GiB, first steps {found['start']:.0f} s",
        flush=True,
    )


def write(work: Path, name: str, found: dict[str, Any]) -> None:
    """Before a turn ends, and again with what came after it: nobody may wait for the last words."""
    (work / f"{name}.json").write_text(json.dumps(found))


def run_ours(
    work: Path, name: str, base: Path, dataset: Path, batch: int, method: str, recompute: bool,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The teacher stage's own function, watched through its job."""
    import torch

    from tasks.core.job import Job
    from tasks.core.refs import ModelDir
    from tasks.teacher import FineTuneConfig
    from tasks.teacher.run import fine_tune

    cuda = torch.cuda.is_available()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if cuda else None
    ticks: list[float] = []
    losses: list[float] = []
    tokens: list[float] = []

    class Watched(Job):
        def metrics(self, step: int, **values: float) -> None:
            super().metrics(step, **values)
            if "tokens_per_second" not in values or step != len(losses) + 1:
                return
            losses.append(values["loss"])
            if step == WARM_UP:
                if cuda:
                    torch.cuda.synchronize()
                wait_for_turn(work, name)
            ticks.append(time.perf_counter())
            tokens.append(values["tokens_per_second"])
            if step == STEPS - PROFILED - 1 and profiler:
                profiler.start()
            if step == STEPS - 1:
                if profiler:
                    profiler.stop()
                write(work, name, found())
                end_turn(work, name)

    def found() -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        last = STEPS - PROFILED - 1
        timed = [b - a for a, b in zip(ticks[WARM_UP + AWAKE : last], ticks[WARM_UP + AWAKE + 1 : last], strict=False)]
        told = {"seconds": timed, "losses": losses, "peak_gib": peak, "start": ticks[0] - began}
        return told | ({"profile": kernels(profiler)} if profiler else {})

    curve = name.startswith("curve")
    asked: dict[str, Any] = dict(
        method=method, rank=32, alpha=32, learning_rate=2e-3 if curve else 2e-4, scheduler="linear", warmup_ratio=0,
        batch_size=batch, micro_batch_size=batch, max_steps=STEPS, max_length=1024, gradient_checkpointing=recompute,
        memory_gib="off", compile="on" if cuda else "auto", precision="auto" if cuda else "float32",
        save_every_seconds=3600,
    )  # fmt: skip
    config = FineTuneConfig(**asked | (settings or {}))
    began = time.perf_counter()
    job = Watched(work / f"work {name}")
    out = work / f"out {name}"
    out.mkdir(exist_ok=True)
    fine_tune(config, ModelDir(base), dataset, out, job)
    return found()


KINDS = {
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "sm90_xmma", "splitK"),
    "head's loss": ("_losses", "_sums", "_gradient"),
    "to and from the host, beside the rest": ("Memcpy DtoH", "Memcpy HtoD"),
    "NF4": ("dequantize",),
    "compiled elementwise": ("triton_",),
    "optimizer": ("adam", "multi_tensor", "Optimizer"),
    "copies": ("Memcpy", "Memset", "copy", "CatArray"),
}


def kernels(profiler: Any) -> dict[str, Any]:
    """Milliseconds a step on the GPU by kind of kernel, and the ten longest."""
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        times[event.key] = times.get(event.key, 0.0) + event.device_time_total / 1e3 / PROFILED
    kinds: dict[str, float] = {}
    for kernel, spent in times.items():
        kind = next((kind for kind, marks in KINDS.items() if any(mark in kernel for mark in marks)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + spent
    longest = sorted(times.items(), key=lambda item: -item[1])[:24]
    return {"kinds": kinds, "longest": longest}


def matmul_rate() -> float:
    """bfloat16 TFLOP/s of an 8192 x 8192 x 8192 product on random data."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(20):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 2 * 8192**3 * 20 / begin.elapsed_time(end) / 1e9


def flops_per_token(shape: str, recompute: bool) -> float:
    """Of the products alone, all tokens labelled: base and head twice, adapters three times, recompute once more."""
    s = SHAPES[shape]
    h, f, heads, kv, d = (s[k] for k in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"))  # fmt: skip
    linears = [(h, heads * d), (h, kv * d), (h, kv * d), (heads * d, h), (h, f), (h, f), (f, h)]
    body = s["num_hidden_layers"] * sum(i * o for i, o in linears)
    adapters = s["num_hidden_layers"] * sum(32 * (i + o) for i, o in linears)
    return 4 * body + 6 * adapters + 4 * h * s["vocab_size"] + recompute * 2 * (body + adapters)


def table(work: Path, only: list[str], at_once: int, patience: float) -> None:
    """Runs the contestants and prints what they did; those of one shape warm up together."""
    work.mkdir(parents=True, exist_ok=True)
    names = only or [name for name in RUNS if "pico" not in name]
    for shape, rows in dict.fromkeys(RUNS[name][1:3] for name in names):
        subprocess.run([sys.executable, "-m", "tests.benchmarks.sft", "prepare", str(work), shape, rows], check=True)
    for start in range(0, len(names), at_once):
        group = names[start : start + at_once]
        command = [sys.executable, "-m", "tests.benchmarks.sft", "run", str(work)]
        take_turns(work, group, lambda name: [*command, name], patience)  # noqa: B023
    show(work, names)


def show(work: Path, names: list[str]) -> None:
    """The table, the curves' difference and the profiles."""
    found = {name: json.loads(path.read_text()) for name in names if (path := work / f"{name}.json").exists()}
    for name in names:
        if name not in found:
            print(f"{name} failed:\n{(work / f'{name}.log').read_text()[-1500:]}")
    for curve in ("curve", "curve pico"):
        if not {f"{curve} ours", f"{curve} trl"} <= found.keys():
            continue
        ours, theirs = found[f"{curve} ours"]["losses"], found[f"{curve} trl"]["losses"]
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=False)]
        print(f"loss of ours {ours[0]:.4f} ... {ours[-1]:.4f}, of TRL {theirs[0]:.4f} ... {theirs[-1]:.4f}; "
              f"largest difference in {len(differences)} steps {max(differences):.4f}")  # fmt: skip
    rate = matmul_rate()
    print(f"bfloat16 products: {rate:.0f} TFLOP/s\n")
    print("| | ms a step | tokens/s | peak GiB | x Unsloth | of the products' roofline |\n|---|---|---|---|---|---|")
    for name in (name for name in names if name in found and not name.startswith("curve")):
        _, shape, rows, method, recompute, *_ = RUNS[name]
        dataset = (work / f"{shape}-{rows}" / "tokens.json").read_text()
        seconds = statistics.median(found[name]["seconds"])
        speed = json.loads(dataset)["tokens_a_step"] / statistics.mean(found[name]["seconds"])
        rival = found.get(
            next((n for n in names if RUNS[n][0] == "unsloth" and RUNS[n][1:4] == (shape, rows, method)), "")
        )
        ratio = f"{statistics.mean(rival['seconds']) / statistics.mean(found[name]['seconds']):.2f}" if rival else ""
        share = speed * flops_per_token(shape, recompute) / rate / 1e12 if rate and rows == "long" else 0.0
        print(
            f"| {name} | {seconds * 1e3:.1f} | {speed:,.0f} | {found[name]['peak_gib']:.2f} | {ratio} | {share:.0%} |"
        )
    for name in (name for name in found if "profile" in found[name]):
        profile = found[name]["profile"]
        print(
            f"\n{name}, GPU ms a step: "
            + ", ".join(f"{k} {v:.1f}" for k, v in sorted(profile["kinds"].items(), key=lambda i: -i[1]))
        )
        for kernel, spent in profile["longest"]:
            print(f"    {spent:7.2f}  {kernel[:110]}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("work", type=Path)
    one.add_argument("name", choices=RUNS)
    made = commands.add_parser("prepare")
    made.add_argument("work", type=Path)
    made.add_argument("shape", choices=SHAPES)
    made.add_argument("rows", choices=BATCH, nargs="+")
    every = commands.add_parser("table")
    every.add_argument("work", type=Path)
    every.add_argument("--only", nargs="*", default=[])
    every.add_argument("--at-once", type=int, default=8, help="as many as fit the card together")
    every.add_argument("--patience", type=float, default=150, help="seconds to warm up in")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.work, arguments.name)
    elif arguments.command == "prepare":
        for rows in arguments.rows:
            prepare(arguments.work, arguments.shape, rows)
    else:
        table(arguments.work, arguments.only, arguments.at_once, arguments.patience)


if __name__ == "__main__":
    main()
