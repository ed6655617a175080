"""Models and rows of the published shapes, and how a measurement is told."""

import gc

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tasks.engine.data.chat_template import Example
from tasks.engine.models.dtypes import pick_device

T, KD, CE = 2.0, 0.7, 0.3
DEVICE = pick_device()
SHAPES = {"teacher": (1152, 6912, 26), "student": (640, 2048, 18)}
PICO = {"teacher": (64, 128, 2), "student": (32, 64, 2)}
SIZES = {"vocabulary": 262144}


def model(kind: str, dtype: torch.dtype, seed: int = 0) -> Gemma3ForCausalLM:
    hidden, ffn, layers = SHAPES[kind]
    heads = dict(num_attention_heads=4, num_key_value_heads=1, head_dim=256 if hidden > 64 else 32)
    config = Gemma3TextConfig(
        vocab_size=SIZES["vocabulary"], hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        sliding_window=512,
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


def examples(count: int, long: bool, seed: int = 1, pieces: int | None = None) -> list[Example]:
    """Rows of random tokens, of the first `pieces` where it says so."""
    g = torch.Generator().manual_seed(seed)
    if long:
        completion = torch.randint(512, 768, (count,), generator=g)
        prompt = 2048 - completion
    else:
        prompt, completion = torch.randint(60, 120, (count,), generator=g), torch.randint(30, 60, (count,), generator=g)
    found = []
    for p, c in zip(prompt.tolist(), completion.tolist(), strict=True):
        ids = torch.randint(5, pieces or SIZES["vocabulary"], (p + c,), generator=g).tolist()
        found.append(Example(ids, [-100] * p + ids[p:]))
    return found


def peak_gib() -> tuple[float, float, float]:
    """GiB that tensors took at most, that torch had from the device at most, and that the device lacks now."""
    if DEVICE == "cpu":
        return 0.0, 0.0, 0.0
    free, whole = torch.cuda.mem_get_info()
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), whole - free
    return peaks[0] / 2**30, peaks[1] / 2**30, peaks[2] / 2**30


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


def say(name: str, batch: int, ms: float, rows: list[Example], peak: tuple[float, ...], note: str = "") -> None:
    """A line of the table: name, rows a step, ms a step, rows and tokens a second, GiB allocated, reserved, in all."""
    tokens = sum(len(row.input_ids) for row in rows) / len(rows) * batch
    gib = " | ".join(f"{part:.1f}" for part in peak)
    rates = f"{ms:.1f} | {batch / ms * 1e3:.1f} | {tokens / ms * 1e3:.0f}"
    print(f"| {name} | {batch} | {rates} | {gib} | {note}", flush=True)
