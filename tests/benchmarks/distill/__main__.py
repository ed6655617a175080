"""See tests/benchmarks/distill/__init__.py."""

import argparse
import tempfile
from pathlib import Path

import torch

from tests.benchmarks import distill
from tests.benchmarks.distill.curve import curve
from tests.benchmarks.distill.job import job
from tests.benchmarks.distill.layers import layers
from tests.benchmarks.distill.parts import loss_alone, parts
from tests.benchmarks.distill.peers import peers
from tests.benchmarks.distill.quickstart import quickstart
from tests.benchmarks.distill.shapes import DEVICE, PICO, SHAPES, SIZES, examples

SIZES_OF = {
    "short": [
        "8/8/256",
        "32/32/512",
        "64/64/1024",
        "128/32/512",
        "128/64/1024",
        "128/128/1280",
        "128/128/1792",
        "256/128/1280",
    ],
    "long": ["2/2/512", "8/4/1024", "8/8/1280"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=distill.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["loss", "parts", "peers", "job", "curve"])
    parser.add_argument("--rows", nargs="+", default=["short", "long"])
    parser.add_argument("--micro", nargs="+", type=int, default=[128, 64])
    parser.add_argument("--sizes", nargs="+", help="ours in `peers`: rows a step/rows at once/MiB of logits")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--pico", action="store_true")
    arguments = parser.parse_args()
    if arguments.pico:
        SHAPES.update(PICO)
        SIZES["vocabulary"] = 1024
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
                    peers(kind, Path(work), arguments.sizes or SIZES_OF[kind])
                elif what == "layers":
                    layers()
                elif what == "quickstart":
                    quickstart(Path(work))
                elif what == "job":
                    job(Path(work))
                else:
                    curve(arguments.out, Path(work))


if __name__ == "__main__":
    main()
