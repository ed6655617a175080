"""Weights walked as a stream against the model loaded and walked, on random weights of Gemma 3 1B's shape.

python -m tests.benchmarks.outliers DIR     # DIR gets 2 GB of weights once; both ways run in a process of their own
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SHAPE = dict(
    vocab_size=262_144,
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
)


def make(directory: Path) -> None:
    """Random bfloat16 weights with Gemma 3 1B's names and shapes."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE)).save_pretrained(directory)


def load_and_walk(directory: Path) -> None:
    """What the usual script does: the model in memory, then each parameter in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for _, parameter in model.named_parameters():
        values = parameter.detach().float().flatten()
        centred = values - values.mean()
        variance = centred.square().mean()
        (float(values.abs().max()), float(variance), float(centred.pow(4).mean() / variance.square()))


def stream(directory: Path) -> None:
    """The stage's command, pictures and all."""
    from tasks.core.job import Job
    from tasks.core.refs import ModelDir
    from tasks.outliers import OutlierConfig
    from tasks.outliers.run import find_outliers

    out = directory / "out"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    out.mkdir()
    find_outliers(OutlierConfig(), {"model": ModelDir(directory)}, out, Job(directory / "work"))


def main() -> None:
    """Prints a line of seconds and peak resident memory for each way; imports are counted, as a user waits for them."""
    directory = Path(sys.argv[1])
    if not (directory / "model.safetensors").is_file():
        subprocess.run([sys.executable, "-m", __spec__.name, str(directory), "make"], check=True)
    for way in ("load_and_walk", "stream"):
        subprocess.run([sys.executable, "-m", __spec__.name, str(directory), way], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main()
    else:
        start = time.perf_counter()
        globals()[sys.argv[2]](Path(sys.argv[1]))
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = {"seconds": round(time.perf_counter() - start, 1), "cpu": round(used.ru_utime + used.ru_stime, 1)}
        print(json.dumps({"way": sys.argv[2], **seconds, "peak_gb": round(used.ru_maxrss / 1e6, 2)}))
