"""How long evaluating takes, and what batching is worth against the one-row loop that the seeds' test script had.

    python -m tests.benchmarks.evaluate quickstart [--rows 400] [--bare]   # the models of the last `make demo`
    python -m tests.benchmarks.evaluate loop [--rows 256] [--shape 270m]   # random weights of a real shape; a GPU

`quickstart` runs the evaluate stage on every model in the store (below STILLHOUSE_HOME, or .stillhouse), one after the
other in one process, as the pipeline does with its warm start; `--bare` asks each row once, and nothing else. `loop`
answers the same prompts with `generate`, one row at a time (some of them), in batches, and with the stage's refilled
slots.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.settings import Settings
from tasks.core.store import open_store
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.generation import GenerationRequest
from tasks.evaluate.greedy_decoding import decode

HOME = Settings().root
BASES = Path("deployments/quickstart")
SHAPES: dict[str, dict[str, int]] = {
    "270m": {"hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048, "num_attention_heads": 4},
    "1b": {"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 4},
    "pico": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2},
}
END = 1


def newest(stage: str) -> list[tuple[dict[str, Any], Path]]:
    """The refs that a stage made, newest last, and where they were fetched to."""
    store = open_store((HOME / "store").as_uri())
    entries = sorted((HOME / "store" / "index" / stage).glob("*.json"), key=lambda path: path.stat().st_mtime)
    refs = [json.loads(path.read_text()) for path in entries]
    return [(ref, store.fetch(ref["digest"], HOME / "inputs" / ref["digest"])) for ref in refs]


def quickstart(rows: int, bare: bool) -> None:
    """The stage on the bases, the adapters, the merged model and its GGUF files."""
    from tasks.evaluate.run import evaluate  # `loop` needs less than the stage does

    dataset, merged = newest("ingest")[-1][1], ModelDir(newest("merge")[-1][1])
    adapters = {ref["base"]["digest"]: (ref, path) for ref, path in newest("teacher")}
    jobs: dict[str, tuple[ModelDir, Path | None]] = {
        f"{name}-base": (ModelDir(BASES / name), None) for name in ("teacher", "student")
    }
    for ref, path in adapters.values():
        name = "teacher" if ref["facts"]["parameters"] > 3e6 else "direct"
        jobs[name] = (ModelDir(BASES / ("teacher" if name == "teacher" else "student"), path), None)
    jobs["student"] = (ModelDir(BASES / "student", newest("distill")[-1][1]), None)
    jobs["merged"] = (merged, None)
    jobs |= {ref["facts"]["format"]: (merged, path) for ref, path in newest("gguf")}
    less = (
        {"latency_rows": 0, "perplexity_rows": 0, "text_tokens": 0}
        if bare
        else {"constrained_rows": 32, "latency_rows": 8}
    )
    config = EvaluateConfig(max_new_tokens=72, batch_size=128, limit_rows=rows, threads=2, **less)
    total = 0.0
    print("| model | seconds | of it answering | tokens/s | exact match |\n|---|---|---|---|---|")
    for name, (model, gguf) in jobs.items():
        with tempfile.TemporaryDirectory() as directory:
            out, start = Path(directory) / "out", time.perf_counter()
            out.mkdir()
            report = evaluate(config, model, dataset, out, Job(Path(directory) / "work"), gguf)
            seconds = time.perf_counter() - start
        total += seconds
        answering = report.details["generation_seconds"]
        facts = report.facts
        found = f"{seconds:.1f} | {answering:.1f} | {facts['tokens_per_second']} | {facts['exact_match']:.1%}"
        print(f"| {name} | {found} |", flush=True)
    print(f"{len(jobs)} models on {rows} rows: {total:.1f} s")


def prompts_of(rows: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of 60 to 120 tokens."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 121, (rows,), generator=chance).tolist()
    return [torch.randint(10, vocabulary, (length,), generator=chance).tolist() for length in lengths]


def random_model(shape: str) -> Any:
    """A Gemma-3 of the shape with random weights, in bfloat16 on a GPU."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    vocabulary = 262144 if shape != "pico" else 1000
    settings = {"num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "vocab_size": vocabulary}
    config = Gemma3TextConfig(**(settings | SHAPES[shape]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        return Gemma3ForCausalLM(config).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


class EndAt:
    """A guide that ends each answer after the length drawn for its row: random weights never say an end token."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.counts = lengths, [0] * len(lengths)

    def allow(self, indices: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """END alone for rows that have one token left, anything else for the others."""
        last = torch.tensor([self.counts[i] + 1 >= self.lengths[i] for i in indices], device=logits.device)
        logits[:, END] = torch.where(last, torch.inf, -torch.inf)
        return logits

    def accept(self, index: int, token: int) -> None:
        """Counts the row's tokens."""
        self.counts[index] += 1


def loop(rows: int, shape: str, slots: int) -> None:
    """Rows a second of each way; every way makes the same number of tokens for each row."""
    model = random_model(shape)
    prompts = prompts_of(rows, model.config.vocab_size)
    lengths = torch.randint(20, 61, (rows,), generator=torch.Generator().manual_seed(1)).tolist()
    few = range(0, rows, max(1, rows // 16))
    request = GenerationRequest(list(range(rows)), prompts, frozenset([END]), max(lengths), slots, 1)
    refilled(model, request, lengths, slots)
    results = {
        "`generate`, one row at a time": one_by_one(model, [prompts[i] for i in few], [lengths[i] for i in few]),
        f"`generate`, batches of {slots}": in_batches(model, prompts, lengths, slots),
        f"this stage, {slots} slots refilled": refilled(model, request, lengths, slots),
    }
    slow = results["`generate`, one row at a time"]
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"\nGemma-3 {shape}, {dtype}, {rows} rows\n\n| way | rows/s | tokens/s | times |\n|---|---|---|---|")
    for name, (count, tokens, seconds) in results.items():
        times = count / seconds / (slow[0] / slow[2])
        print(f"| {name} | {count / seconds:.1f} | {tokens / seconds:.0f} | {times:.1f} |", flush=True)


def refilled(model: Any, request: GenerationRequest, lengths: list[int], slots: int) -> tuple[int, int, float]:
    """This stage's decoding."""
    start = clock()
    answers = dict(decode(model, request, range(len(lengths)), slots, EndAt(lengths)))
    seconds = clock() - start
    assert [len(answers[i]) for i in range(len(lengths))] == lengths
    return len(lengths), sum(lengths), seconds


def one_by_one(model: Any, prompts: list[list[int]], lengths: list[int]) -> tuple[int, int, float]:
    """The seeds' loop: `generate` for a batch of one, row after row."""
    generated(model, prompts[:1], 8)
    start = clock()
    for prompt, length in zip(prompts, lengths, strict=True):
        generated(model, [prompt], length)
    return len(prompts), sum(lengths), clock() - start


def in_batches(model: Any, prompts: list[list[int]], lengths: list[int], size: int) -> tuple[int, int, float]:
    """`generate` in padded batches of like length; each runs as long as its longest answer."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    generated(model, [prompts[i] for i in order[:size]], 8)
    start = clock()
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        generated(model, [prompts[i] for i in rows], max(lengths[i] for i in rows))
    return len(prompts), sum(lengths), clock() - start


@torch.inference_mode()
def generated(model: Any, prompts: list[list[int]], new: int) -> None:
    """`generate`, greedy, exactly `new` tokens."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    length = {"max_new_tokens": new, "min_new_tokens": new}
    model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)


def clock() -> float:
    """Seconds, once the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quickstart", "loop"])
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), default="270m")
    parser.add_argument("--slots", type=int, default=64)
    given = parser.parse_args()
    if given.what == "quickstart":
        quickstart(given.rows or 400, given.bare)
    else:
        loop(given.rows or 256, given.shape, given.slots)


if __name__ == "__main__":
    main()
