"""Prints the size of the file of each kind for a model, to the byte but for this project's provenance.

python -m tasks.gguf.file_sizes MODEL_DIR [--kinds Q8_0 Q4_K_M] [--embedding-type Q4_0] [--output-type Q6_K]
    [--outliers DIR] [--budget-mb 120]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tasks.core.errors import StageError
from tasks.core.job import Job
from tasks.engine.runtimes.ggml_types import TYPES
from tasks.gguf import GgufConfig
from tasks.gguf.conversion_plan import plans_by_size
from tasks.gguf.convert import open_conversion
from tasks.gguf.kind_choice import with_advice
from tasks.gguf.kinds import KINDS
from tasks.gguf.plan_page import markdown, tensors_markdown
from tasks.gguf.sensitive import sentence


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The size of the file of each kind.")
    parser.add_argument("model", type=Path, help="a model directory in Hugging Face's layout, or a 16-bit GGUF")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--embedding-type", choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--output-type", choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--tensors", action="store_true", help="the type of every tensor, too")
    parser.add_argument("--name", default="stillhouse", help="general.name, which is in the file")
    parser.add_argument("--outliers", type=Path, metavar="DIR", help="that stage's output: sensitive tensors to raise")
    parser.add_argument("--budget-mb", type=float, metavar="MB", help="largest file with raised tensors; else 5%% more")
    return parser.parse_args()


def main() -> None:
    """Plans all kinds and prints their tables."""
    arguments = _arguments()
    types = {"embedding_type": arguments.embedding_type, "output_type": arguments.output_type}
    with tempfile.TemporaryDirectory() as work:
        try:
            with open_conversion(arguments.model, arguments.name, Job(Path(work))) as conversion:
                plans = plans_by_size(conversion.layout, arguments.kinds, **types)
                config = GgufConfig(kind="Q8_0", budget_mb=arguments.budget_mb)
                plans = [with_advice(config, plan, conversion.layout, arguments.outliers) for plan in plans]
        except StageError as error:
            sys.exit(f"file sizes: {error}")
    print(markdown(plans))
    for plan in plans:
        if plan.advice:
            print(f"\n{plan.kind}, raised by the verdict: {sentence(plan.advice)}")
            print(f"  overrides: {json.dumps(dict(step.override for step in plan.advice))}")
    if arguments.tensors:
        print(*(f"\n{plan.kind}\n\n{tensors_markdown(plan)}" for plan in plans), sep="\n")


if __name__ == "__main__":
    main()
