"""Counts names that tell a story (`found`, `told`, `one`, `place`) where the field has a term.

    python -m tests.test_names                      share of such names in `flows` and `tasks`, and the worst files
    python -m tests.test_names tasks/ingest -v      each of them, with file and line

Counted are names where they are bound: variables, parameters, functions, classes and import aliases; `self`, `_` and
dunder names are left out. A name counts as a story's when one of its words, split at underscores, is in `STORY`. By the
same count mergekit has 0.1 % and torchtitan 0.4 %.
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STORY = frozenset({
    "found", "told", "tell", "tells", "one", "ones", "place", "places", "at", "said", "say", "says", "known",
    "knows", "asked", "asks", "ask", "given", "gives", "kept", "keeps", "taken", "take", "takes", "seen", "shown",
    "shows", "made", "makes", "wanted", "wants", "own", "ours", "theirs", "mine", "into", "many", "few", "most",
    "fewest", "there", "here", "more", "others", "some", "rest", "what", "now", "both", "because", "beside",
    "alone", "away", "held", "looked", "judged", "spoken", "tried", "had", "begun", "began", "gone", "goes",
    "stands", "lies", "whole", "better", "worse", "nothing", "something", "anything", "everybody", "whoever",
    "together", "apart", "until", "again", "anew", "once", "later", "learnt", "helps", "helped", "done", "brought",
    "carried", "meant",
})  # fmt: skip


class Binding(NamedTuple):
    """A name where it is bound."""

    path: Path
    line: int
    name: str

    @property
    def tells_a_story(self) -> bool:
        """Whether one of the name's words is in `STORY`."""
        return not STORY.isdisjoint(self.name.lower().strip("_").split("_"))


def bindings(path: Path) -> Iterator[Binding]:
    """Every name that a Python file binds, attributes and keyword arguments aside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.alias):
            name = node.asname
        if name and name not in ("self", "cls", "_") and not name.startswith("__"):
            yield Binding(path, getattr(node, "lineno", 0), name)


def count(paths: list[Path]) -> tuple[list[Binding], int]:
    """The names that tell a story below `paths`, and how many names there are in all."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    bound = [binding for file in files for binding in bindings(file)]
    return [binding for binding in bound if binding.tells_a_story], len(bound)


def test_names_are_the_field_s() -> None:
    story, total = count([ROOT / "flows", ROOT / "tasks"])
    assert len(story) < 0.01 * total, "python -m tests.test_names -v lists them"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "flows", ROOT / "tasks"])
    parser.add_argument("-v", "--verbose", action="store_true", help="every name, with file and line")
    arguments = parser.parse_args()
    story, total = count(arguments.paths)
    if arguments.verbose:
        for binding in story:
            print(f"{binding.path}:{binding.line}: {binding.name}")
    print(f"{len(story)} of {total} names tell a story: {100 * len(story) / total:.2f} %")
    print("most often:", ", ".join(f"{name} {n}" for name, n in Counter(b.name for b in story).most_common(12)))
    for path, n in Counter(binding.path for binding in story).most_common(8):
        print(f"{n:5}  {path}")


if __name__ == "__main__":
    main()
