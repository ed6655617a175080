"""Distillation at real shapes on one GPU: our trainer and its parts beside the peers' loops, in one process.

    python -m tests.benchmarks.distill [parts] [loss] [peers] [job] [curve] [--rows short long] [--out DIR]

    parts   our trainer at 128 rows a step, with packing, CUDA graphs and compilation taken away one by one
    loss    the loss alone: chunk sizes, the kernel against plain torch, its error against float64
    peers   the seeds' loop, full logits batched, Liger's fused JSD, and ours at 8, 32 and 128 rows a step
    job     1 892 rows, 2 epochs, 32 rows a step: the teacher's pass, and the training steps on its states
    quickstart  on the CPU: the quickstart's bases and rows, our trainer beside the seeds' loop and the batched one
    curve   validation KL against wall time for the seeds' loop, Liger's and ours: each row once, from the same start

Random weights of Gemma-3-1B (teacher) and Gemma-3-270M (student), vocabulary 262144, full fine-tune. Peers train
bfloat16 weights with fused AdamW, ours float32 weights under bfloat16 autocast. Short rows are 60 to 120 prompt and 30
to 60 completion tokens, long ones 2048 tokens with 512 to 768 of completion. `--pico` tries everything on tiny models.
"""

import argparse
import contextlib
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.distill import DistillConfig
from tasks.distill.lessons import Lessons
from tasks.distill.run import objective
from tasks.distill.states.store import Kept, States
from tasks.distill.states.teacher import Ask, remember_rows
from tasks.distill.teachers import Remembered
from tasks.engine.chat import Example, encode
from tasks.engine.load import load_model, load_tokenizer, pick_device
from tasks.engine.losses import Head, Mix, distillation
from tasks.engine.plan import Plan, validation_losses
from tasks.engine.trainer import train

T, KD, CE = 2.0, 0.7, 0.3
DEVICE = pick_device()
SHAPES = {"teacher": (1152, 6912, 26), "student": (640, 2048, 18)}
PICO = {"teacher": (64, 128, 2), "student": (32, 64, 2)}
VOCAB = 262144


def model(kind: str, dtype: torch.dtype, seed: int = 0) -> Gemma3ForCausalLM:
    hidden, ffn, layers = SHAPES[kind]
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=256 if hidden > 64 else 32)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, sliding_window=512,
        max_position_embeddings=32768, query_pre_attn_scalar=256, **heads,
    )  # fmt: skip
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        built = Gemma3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if kind == "teacher":  # quieter layers: what it says then hangs on the token before, and can be learnt
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if "post_" in name:
                    parameter.fill_(-0.8)  # Gemma's gain is 1 + weight
    return built


def examples(count: int, long: bool, seed: int = 1) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    if long:
        completion = torch.randint(512, 768, (count,), generator=g)
        prompt = 2048 - completion
    else:
        prompt, completion = torch.randint(60, 120, (count,), generator=g), torch.randint(30, 60, (count,), generator=g)
    found = []
    for p, c in zip(prompt.tolist(), completion.tolist(), strict=True):
        ids = torch.randint(5, VOCAB, (p + c,), generator=g).tolist()
        found.append(Example(ids, [-100] * p + ids[p:]))
    return found


def peak_gib(reserved: bool) -> float:
    if DEVICE == "cpu":
        return 0.0
    return (torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()) / 2**30


def fresh() -> None:
    gc.collect()
    torch._dynamo.reset()  # nobody inherits another's compiled shapes
    torch._dynamo.config.suppress_errors = False
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def states_of(rows: list[Example], directory: Path) -> tuple[States, float]:
    """The teacher run once over the rows, and the seconds it took, from its loading on the device to the files."""
    config = DistillConfig().states
    teacher = model("teacher", torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()
    dtype = str(teacher.dtype).removeprefix("torch.")
    kept = Kept(SHAPES["teacher"][0], dtype)
    job = Job(directory / "job")
    sync()
    start = time.perf_counter()
    found = remember_rows(Ask(lambda: teacher, "bench", kept, config), rows, None, directory / "states", job)
    return found, time.perf_counter() - start


def ours(
    states: States, rows: list[Example], steps: int, batch: int, micro: int, validation: list[Example] | None = None,
    student: Callable[[], Any] | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run of the engine's trainer: ms a step by its event times, peak GiB reserved, the plan and its model."""
    fresh()
    settings = dict(epochs=1, batch_size=batch, micro_batch_size=micro, max_steps=steps, learning_rate=1e-4,
                    warmup_ratio=0, save_every_seconds=1e9, scheduler="constant") | settings  # fmt: skip
    if DEVICE == "cpu":
        settings["compile"] = "off"
    config = DistillConfig(**settings)
    everything = [*rows, *(validation or [])]
    lessons = Lessons(rows, Remembered(states, everything, T))
    with tempfile.TemporaryDirectory() as work:
        job = Job(Path(work))
        plan = Plan(
            build=student or (lambda: model("student", torch.float32)), examples=rows, validation=validation or [],
            objective=objective(lessons, Mix(KD, CE, T), None, config.loss_chunk_mib << 20), config=config, job=job,
            made_by="bench", enrich=lessons.taught.enrich,
        )  # fmt: skip
        with no_checkpoints():
            trained, history = train(plan)
        peak = peak_gib(reserved=True)
        told = [json.loads(line) for line in (Path(work) / "events.jsonl").read_text().splitlines()]
    times = [e["time"] for e in told if e["event"] == "metrics" and "grad_norm" in e["values"]]
    skip = min(len(times) - 2, max(3, len(times) // 3))
    mean = (times[-1] - times[skip]) / (len(times) - 1 - skip)
    gaps = sorted(b - a for a, b in zip(times[skip:], times[skip + 1 :], strict=False))
    return {"ms": mean * 1e3, "median": gaps[len(gaps) // 2] * 1e3, "peak": peak, "plan": plan, "model": trained,
            "times": times, "history": history, "first": times[skip] - times[0]}  # fmt: skip


@contextlib.contextmanager
def no_checkpoints() -> Any:
    """The last step's checkpoint is left out: 4 GB of random weights."""
    from tasks.engine import checkpoint

    written, checkpoint.write = checkpoint.write, lambda *_, **__: Path()
    yield
    checkpoint.write = written


def say(name: str, batch: int, ms: float, rows: list[Example], peak: float, note: str = "") -> None:
    tokens = sum(len(row.input_ids) for row in rows) / len(rows) * batch
    print(
        f"| {name} | {batch} | {ms:.1f} | {batch / ms * 1e3:.0f} | {tokens / ms * 1e3:.0f} | {peak:.1f} | {note}",
        flush=True,
    )


# --- the peers' loops


def padded(rows: list[Example], longest: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
    return ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE)


def full_logits(student: Any, teacher: Any) -> Callable[..., Tensor]:
    """KL + CE on whole float32 logits at every position: the seeds' loop, and most trainers'."""

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            t = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        s = student(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        y = labels[:, 1:]
        keep = y != -100
        kl = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="none").sum(-1)
        kl = (kl * keep).sum() / keep.sum() * T * T
        return KD * kl + CE * F.cross_entropy(s.flatten(0, 1), y.reshape(-1), ignore_index=-100)

    return loss


def liger(student: Any, teacher: Any) -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Its divergence has no T^2: the weight makes up for it.
    fused = LigerFusedLinearJSDLoss(weight_hard_loss=CE, weight_soft_loss=KD * T * T, beta=0.0, temperature=T)

    def loss(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        s = student.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1].flatten(0, 1)
        with torch.no_grad():
            t = teacher.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1].flatten(0, 1)
        out = fused(s, student.lm_head.weight, t, teacher.lm_head.weight, labels[:, 1:].flatten())
        return out[0] if isinstance(out, tuple) else out

    return loss


PEERS: dict[str, tuple[Callable[..., Any], int]] = {  # and how many rows are padded together
    "the seeds' loop": (full_logits, 1),
    "full logits, batched": (full_logits, 1000),
    "Liger fused linear JSD": (liger, 1000),
}


def peer_steps(
    name: str, student: Any, teacher: Any, rows: list[Example], batch: int, rate: float = 1e-4
) -> Callable[[int], None]:
    """`step(i)` of a peer's loop."""
    make, together = PEERS[name]
    loss, together = make(student, teacher), min(together, batch)
    longest = max(len(row.input_ids) for row in rows)  # one shape: what is compiled is compiled once
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, fused=DEVICE == "cuda", weight_decay=0)

    def step(i: int) -> None:
        some = [rows[(i * batch + j) % len(rows)] for j in range(batch)]
        for start in range(0, batch, together):
            (loss(*padded(some[start : start + together], longest)) / (batch // together)).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer(name: str, rows: list[Example], batch: int, steps: int) -> None:
    fresh()
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    try:
        teacher, student = model("teacher", dtype).eval().requires_grad_(False), model("student", dtype)
        step = peer_steps(name, student, teacher, rows, batch)
        for i in range(2):
            step(i)
        sync()
        start = time.perf_counter()
        for i in range(steps):
            step(i)
        sync()
        say(name, batch, (time.perf_counter() - start) / steps * 1e3, rows, peak_gib(reserved=False))
    except (torch.OutOfMemoryError, ImportError) as error:
        print(f"| {name} | {batch} | {type(error).__name__}", flush=True)


# --- what is measured

VARIANTS: dict[str, dict[str, Any]] = {
    "padded, eager": {"packing": "off", "cuda_graphs": "off", "compile": "off"},
    "packed, eager": {"cuda_graphs": "off", "compile": "off"},
    "packed, graph": {"compile": "off"},
    "packed, compiled, graph": {"compile": "on"},
}


def parts(rows: list[Example], directory: Path, batch: int, micros: list[int]) -> None:
    states, _ = states_of(rows, directory)
    for name, settings in VARIANTS.items():
        for micro in micros if "compiled" in name else micros[:1]:
            run = ours(states, rows, 24, batch, micro, **settings, loss_chunk_mib=1024)
            say(
                f"{name}, {batch // micro} micro-batches",
                batch,
                run["ms"],
                rows,
                run["peak"],
                f"median {run['median']:.1f}, first steps {run['first']:.0f} s",
            )
            del run


def timed(call: Callable[[], Any], count: int = 5) -> float:
    """Milliseconds of a call, by events."""
    call()
    if DEVICE == "cpu":
        return 0.0
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    sync()
    return float(begin.elapsed_time(end) / count)


def loss_alone(labels: int = 5760) -> None:
    """Milliseconds of forward and backward for 128 short rows' labels, by chunk; errors against float64."""
    g = torch.Generator(DEVICE).manual_seed(0)
    (hidden, _, _), (width, _, _) = SHAPES["student"], SHAPES["teacher"]

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=DEVICE) * scale).bfloat16()

    student, teacher = Head(randn(VOCAB, hidden, scale=0.06)), Head(randn(VOCAB, width, scale=0.05))
    x, states = randn(labels, hidden), randn(labels, width)
    y = torch.randint(0, VOCAB, (labels,), generator=g, device=DEVICE)
    mix, into = Mix(KD, CE, T), torch.zeros(VOCAB, hidden, device=DEVICE)
    parts = mix.weights(x.device)
    x.requires_grad_()
    for mib in (256, 512, 1024, 2048, 4096):
        fresh()
        run = functools.partial(distillation, x, student, y, states, teacher, mix, mib << 20, into=into, parts=parts)
        ms = timed(lambda run=run: run().loss.backward())  # type: ignore[misc]
        print(f"| loss, chunk {mib} MiB | {ms:.2f} ms | peak {peak_gib(False):.2f} GiB", flush=True)
    n = 64
    into.zero_()
    x.grad = None
    got = distillation(x[:n], student, y[:n], states[:n], teacher, mix, into=into)
    got.loss.backward()
    exact = x[:n].detach().double().requires_grad_(), student.weight.double().requires_grad_()
    want = distillation(exact[0], Head(exact[1]), y[:n], states[:n].double(), Head(teacher.weight.double()), mix)
    want.loss.backward()
    pairs = {
        "kd": (got.kd_loss, want.kd_loss), "ce": (got.ce_loss, want.ce_loss), "d head": (into, exact[1].grad),
        "d hidden": (x.grad[:n], exact[0].grad), "kd norm": (got.kd_grad_norm, want.kd_grad_norm),
    }  # fmt: skip
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    print(
        "| relative error against float64 | " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True
    )


def peers(kind: str, directory: Path) -> None:
    """Everybody's rows a second at several sizes of a step."""
    long = kind == "long"
    rows = examples(384 if not long else 24, long)
    plan = [("the seeds' loop", 8, 1), ("full logits, batched", 32, 3), ("Liger fused linear JSD", 8, 4),
            ("Liger fused linear JSD", 32, 4), ("Liger fused linear JSD", 128, 2)]  # fmt: skip
    if long:
        plan = [("the seeds' loop", 2, 1), ("Liger fused linear JSD", 2, 3), ("Liger fused linear JSD", 8, 2)]
    states, _ = states_of(rows, directory)
    sizes = (
        [(8, 8, 256), (32, 32, 512), (128, 64, 1024), (128, 128, 1024)]
        if not long
        else [(2, 2, 512), (8, 4, 1024), (8, 8, 1024)]
    )
    for batch, micro, mib in sizes:
        run = ours(states, rows, 30, batch, micro, compile="on", loss_chunk_mib=mib)
        say(
            f"ours, {batch // micro} micro-batches, loss chunk {mib} MiB",
            batch,
            run["ms"],
            rows,
            run["peak"],
            f"first steps {run['first']:.0f} s",
        )
        del run
    for name, batch, steps in plan:
        peer(name, rows, batch, steps)


def job(directory: Path) -> None:
    """The seeds' job: the teacher once, then two epochs on its states."""
    rows = examples(1892, False)
    states, seconds = states_of(rows, directory)
    gib = states.starts[-1] * states.kept.bytes_per_label / 2**30
    print(
        f"| the teacher's pass over 1892 rows, {states.starts[-1]} labels, to disk ({gib:.2f} GiB) | {seconds:.2f} s |",
        flush=True,
    )
    for settings in ({"compile": "off"}, {"compile": "on"}):
        run = ours(states, rows, 0, 32, 32, **settings, max_steps=None, epochs=2, loss_chunk_mib=512)
        times = run["times"]
        print(
            f"| 2 epochs, {len(times)} steps of 32 rows, {settings} | {times[-1] - times[0]:.2f} s from the first "
            f"step's end to the last's, {run['ms']:.1f} ms a step at the end | peak {run['peak']:.1f} GiB |",
            flush=True,
        )  # fmt: skip
        del run


def curve(out: Path, directory: Path, steps: int = 12) -> None:
    """Validation KL by wall time: everybody from the same weights, each row once, 32 a step; a picture and JSON."""
    rows, held = examples(steps * 32, False), examples(64, False, seed=2)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    states, _ = states_of([*rows, *held], directory)
    found: dict[str, list[tuple[float, float]]] = {}
    few: dict[str, Any] = dict(validation=held, compile="on", loss_chunk_mib=512)
    run = ours(states, rows, 1, 32, 32, **few)
    plan = run["plan"]

    def measured(student: Any) -> float:
        return validation_losses(plan, student)["kd_loss"]

    # Ours runs once whole for its clock, and once more with a look at the student after every second step.
    run = ours(states, rows, steps, 32, 32, **few)
    run = ours(states, rows, steps, 32, 32, **few)
    times = [0.0, *(t - run["times"][0] + run["ms"] / 1e3 for t in run["times"])]
    looked = ours(states, rows, steps, 32, 32, **few, validate_every_steps=2)
    at = [int(step) for step in looked["history"].validation["step"]]
    values = looked["history"].validation["kd_loss"]
    values.append(measured(looked["model"]))
    start = measured(model("student", torch.float32))
    found["ours"] = [(0.0, start), *((times[step], kl) for step, kl in zip([*at, steps], values, strict=True))]
    del looked, run
    order = plan.config.batch_size
    for name in ("Liger fused linear JSD", "the seeds' loop"):
        fresh()
        student, teacher = model("student", dtype), model("teacher", dtype).eval().requires_grad_(False)
        step, clock = peer_steps(name, student, teacher, rows, order), 0.0
        if name != "the seeds' loop":  # what is compiled is not counted for anybody
            step(0)
            student.load_state_dict(model("student", dtype).state_dict())
            step = peer_steps(name, student, teacher, rows, order)
        found[name] = [(0.0, start)]
        for i in range(steps):
            sync()
            begin = time.perf_counter()
            step(i)
            sync()
            clock += time.perf_counter() - begin
            if i % 2:
                found[name].append((clock, measured(student)))
        del student, teacher, step
    for name, points in found.items():
        print(f"| {name} | " + ", ".join(f"{t:.2f} s: {kl:.4f}" for t, kl in points), flush=True)
    target = max(points[-1][1] for points in found.values())
    for name, points in found.items():
        reached = next(t for t, kl in points if kl <= target)
        print(f"| {name} | {reached:.2f} s to a validation KL of {target:.4f} (T^2 times nats a label) |", flush=True)
    (out / "distill_curve.json").write_text(json.dumps(found))
    draw(found, out / "distill_curve.png")


def quickstart(directory: Path, count: int = 192) -> None:
    """Seconds a step of 32 rows, all of the student trained; ours with its share of the teacher's one pass."""
    base = Path("deployments/quickstart")
    tokenizer = load_tokenizer(ModelDir(base / "student"))
    lines = (base / "data" / "train.jsonl").read_text().splitlines()[:count]
    rows = []
    for line in map(json.loads, lines):
        turns = zip(("user", "assistant"), (line["instruction"] + line["input"], line["output"]), strict=True)
        rows.append(encode(tokenizer, Row(messages=[Message(role=role, content=text) for role, text in turns])))
    teacher, student = (load_model(ModelDir(base / name), "float32") for name in ("teacher", "student"))
    ask = Ask(lambda: teacher, "quickstart", Kept(teacher.config.hidden_size, "float32"), DistillConfig().states)
    start = time.perf_counter()
    states = remember_rows(ask, rows, None, directory / "states", Job(directory / "job"))
    asked = (time.perf_counter() - start) / count * 32
    steps = count // 32
    run = ours(states, rows, steps, 32, 32, student=lambda: load_model(ModelDir(base / "student"), "float32"))
    print(f"| ours | {run['median'] / 1e3:.2f} s a step, and once {asked:.2f} s for its rows' states", flush=True)
    for name, together in (("the seeds' loop", 1), ("full logits, batched", 32)):
        step = peer_steps(name, student, teacher, rows, 32)
        step(0)
        start = time.perf_counter()
        for i in range(1, 3):
            step(i)
        print(f"| {name}, {together} together | {(time.perf_counter() - start) / 2:.2f} s a step", flush=True)


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in found.items():
        axes.plot([max(t, 1e-2) for t, _ in points], [kl for _, kl in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="seconds of training steps", ylabel="validation KL, T^2 * nats a label",
             title="1B -> 270M shapes, 32 rows a step, one H200: each row once, from the same start")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["loss", "parts", "peers", "job", "curve"])
    parser.add_argument("--rows", nargs="+", default=["short", "long"])
    parser.add_argument("--micro", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--pico", action="store_true")
    arguments = parser.parse_args()
    if arguments.pico:
        global VOCAB
        SHAPES.update(PICO)
        VOCAB = 1024
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}", flush=True)
    for what in arguments.what:
        for kind in arguments.rows if what in ("parts", "peers") else [""]:
            print(f"\n## {what} {kind}", flush=True)
            with tempfile.TemporaryDirectory() as work:
                if what == "loss":
                    loss_alone(5760 if not arguments.pico else 300)
                elif what == "parts":
                    long = kind == "long"
                    parts(examples(384 if not long else 24, long), Path(work), 8 if long else 128,
                          [8, 4] if long else arguments.micro)  # fmt: skip
                elif what == "peers":
                    peers(kind, Path(work))
                elif what == "quickstart":
                    quickstart(Path(work))
                elif what == "job":
                    job(Path(work))
                else:
                    curve(arguments.out, Path(work))


if __name__ == "__main__":
    main()
