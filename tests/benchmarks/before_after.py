"""Two revisions of the project side by side on one GPU: step times, peak memory and losses of the same runs.

    python -m tests.benchmarks.before_after OLD_TREE WORK [--only NAME ...] [--distil]

OLD_TREE is a checkout of the other revision (`git worktree add OLD_TREE REVISION`). Fine-tuning runs are those of
tests.benchmarks.sft, all of both revisions warmed up side by side and timed one after another (turns.py); `--distil`
adds tests.benchmarks.distill.two, each revision twice, in turn. A ratio above 1 says that the new revision is slower.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.sft import RUNS
from tests.benchmarks.turns import take_turns

NEW_TREE = Path(__file__).parents[2]
NAMES = ["ours bf16", "ours bf16 fast", "ours nf4", "ours bf16 short", "ours fp8"]


def fine_tuning(trees: dict[str, Path], work: Path, names: list[str], patience: float) -> None:
    """Runs each name in both trees and prints a row a name."""
    for label, tree in trees.items():
        (work / label).mkdir(parents=True, exist_ok=True)
        for shape, rows in dict.fromkeys(RUNS[name][1:3] for name in names):
            subprocess.run([*sft(tree), "prepare", str(work / label), shape, rows], check=True)
    contestants = [f"{label}/{name}" for name in names for label in trees]

    def command(contestant: str) -> list[str]:
        label, _, name = contestant.partition("/")
        return [*sft(trees[label]), "run", str(work / label), name]

    take_turns(work, contestants, command, patience)
    print("| run | old ms | new ms | new / old | old GiB | new GiB | largest loss difference |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        files = [work / label / f"{name}.json" for label in trees]
        if not all(file.exists() for file in files):
            logs = [(work / f"{label}/{name}.log").read_text()[-1500:] for label in trees]
            print(f"| {name} failed |", *logs, sep="\n")
            continue
        old, new = (json.loads(file.read_text()) for file in files)
        old_ms, new_ms = (1e3 * statistics.median(run["seconds"]) for run in (old, new))
        difference = max(abs(a - b) for a, b in zip(old["losses"], new["losses"], strict=False))
        print(
            f"| {name} | {old_ms:.2f} | {new_ms:.2f} | {new_ms / old_ms:.4f} | {old['peak_gib']:.2f} | "
            f"{new['peak_gib']:.2f} | {difference:.2e} |",
            flush=True,
        )


def sft(tree: Path) -> list[str]:
    """The command of a tree's fine-tuning benchmark."""
    return ["env", "-C", str(tree), sys.executable, "-m", "tests.benchmarks.sft"]


def distillation(trees: dict[str, Path], rounds: int = 2) -> None:
    """Runs each tree's distillation benchmark in turn; each prints its own line."""
    for number in range(rounds):
        for label, tree in trees.items():
            print(f"distillation, {label}, round {number + 1}:", flush=True)
            subprocess.run([sys.executable, "-m", "tests.benchmarks.distill.two"], cwd=tree, check=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old_tree", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=RUNS)
    parser.add_argument("--patience", type=float, default=150, help="seconds to warm up in")
    parser.add_argument("--distil", action="store_true")
    arguments = parser.parse_args()
    trees = {"old": arguments.old_tree.resolve(), "new": NEW_TREE}
    if arguments.only:
        fine_tuning(trees, arguments.work.resolve(), arguments.only, arguments.patience)
    if arguments.distil:
        distillation(trees)


if __name__ == "__main__":
    main()
