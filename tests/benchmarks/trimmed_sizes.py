"""What a smaller vocabulary makes of the 270M's files: real GGUF files of random weights, through the real stages.

    python -m tests.benchmarks.trimmed_sizes DIR [--rows 262144 65536 32768]

The shape is Gemma-3-270M's, its tokenizer the stand-in of 262 144 pieces of `tests.benchmarks.gguf`. Each vocabulary is
trimmed as the distill stage does it and converted by the gguf stage, which compares llama.cpp's token ids and logits
with the model's on two rows. Takes 4 GB of memory and 3 GB of disk.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from tasks.core.command import Report
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.vocabulary_trim import trim
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.gguf import GgufConfig
from tasks.gguf.run import convert
from tests.benchmarks.gguf import PIECES, shaped_model
from tests.engine.rows import example_dataset, example_rows
from tests.rows import write_rows

FILES = {
    "Q8_0": {"kind": "Q8_0"},
    "Q4_0": {"kind": "Q4_0"},
    "all Q4_0": {"kind": "Q4_0", "embedding_type": "Q4_0"},
}


def sizes(model: ModelDir, dataset: Path, rows: int, work: Path) -> dict[str, object]:
    """Bytes of the files with `rows` pieces kept, and what their proofs said."""
    start, report = time.time(), Report()
    trimmed = trim(
        DistillConfig(vocabulary=rows if rows < PIECES else None), model, load_tokenizer(model), dataset, None, report,
        Job(work),
    )  # fmt: skip
    found: dict[str, object] = {"rows": rows, "trim_seconds": round(time.time() - start, 1), **report.details}
    for name, settings in FILES.items():
        out = work / "out"
        out.mkdir()
        # Random weights have no likely token: the logits' divergence says whether the file is right.
        config = GgufConfig(**settings, imatrix=False, min_top1=0, proof_rows=2)
        done = convert(config, trimmed.student if trimmed else model, out, Job(work), dataset)
        file = out / "model.gguf"
        found[name] = {"bytes": file.stat().st_size, "types": done.details["types"], "mean_kl": done.metrics["mean_kl"]}
        shutil.rmtree(out)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[PIECES, 65536, 32768])
    arguments = parser.parse_args()
    base = ModelDir(shaped_model(arguments.directory / "270m", "270m"))
    dataset = example_dataset(arguments.directory / "dataset")
    write_rows(dataset / "test.jsonl", example_rows(4, start=60))
    for rows in arguments.rows:
        work = arguments.directory / f"work-{rows}"
        print(json.dumps(sizes(base, dataset, rows, work)), flush=True)
        shutil.rmtree(work)
