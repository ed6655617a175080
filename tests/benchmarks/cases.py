"""What ingest makes of small inputs that ordinary tools write: runs its command over every folder below a directory.

python -m tests.benchmarks.cases DIR                      # the table as Markdown: every folder, H* as hub datasets
python -m tests.benchmarks.cases DIR --only 'A*' 'X*'     # folders of these names
python -m tests.benchmarks.cases DIR --write cases.md     # writes the table to a page, too
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tasks.core.errors import StageError
from tasks.core.sources import collect_source

HUB = "H*"
CONFIG = '{"allow_few_rows": true}'
USUAL_WARNINGS = ("Only ", "No tokenizer was given")
MAX_CELL = 300
HEAD = ("case", "read", "quarantined", "splits", "first reason", "unread fields", "what the command says")


class Outcome(NamedTuple):
    """What the command made of one case; `reason` is the first of quarantine.jsonl, `message` the error or warnings."""

    case: str
    exit_code: int
    splits: dict[str, int]
    quarantined: int
    reason: str
    unread: dict[str, Any]
    message: str

    def cells(self) -> tuple[str, ...]:
        """The outcome as cells of the table, in the order of HEAD."""
        splits = ", ".join(f"{name} {count}" for name, count in self.splits.items() if count)
        read = "refused" if self.exit_code else str(sum(self.splits.values()))
        return (self.case, read, str(self.quarantined), splits, self.reason, ", ".join(self.unread), self.message)


def outcome(case: Path) -> Outcome:
    """Runs the command of ingest on a case in a temporary directory."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(CONFIG)
        out, files = directory / "out", case
        try:
            if fnmatch(case.name, HUB):
                collect_source("train", f"hub:{case}", directory, lambda _: None)
                files = directory / "files"
        except StageError as error:
            return Outcome(case.name, error.exit_code, {}, 0, "", {}, str(error))
        command = [sys.executable, "-m", "tasks.ingest.run", str(directory / "config.json"), "--files", str(files)]
        process = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
        failure = directory / "out.work" / "error.json"
        if process.returncode:
            message = _message(failure, process.stderr)
        else:
            lines = process.stderr.splitlines()
            warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
            message = " ".join(text for text in warnings if not text.startswith(USUAL_WARNINGS))
        message = message.replace(f"{directory}/", "")
        quarantine = list(_json_lines(out / "quarantine.jsonl"))
        profile = json.loads((out / "profile.json").read_text()) if (out / "profile.json").exists() else {}
        splits = {split: sum(1 for _ in _json_lines(out / f"{split}.jsonl")) for split in _splits(out)}
        reason = f"{quarantine[0]['file']}:{quarantine[0]['line']}: {quarantine[0]['reason']}" if quarantine else ""
        unread = profile.get("unread_fields", {})
        return Outcome(case.name, process.returncode, splits, len(quarantine), reason, unread, message)


def _message(failure: Path, log: str) -> str:
    """The command's own error message; where it crashed, the last line of its log."""
    if failure.exists():
        return str(json.loads(failure.read_text())["message"])
    return f"crashed: {log.strip().splitlines()[-1:]}"


def _splits(out: Path) -> list[str]:
    return [name for name in ("train", "validation", "test", "preference") if (out / f"{name}.jsonl").exists()]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = [HEAD, ("---",) * len(HEAD), *(tuple(map(_cell, one.cells())) for one in outcomes)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names or patterns of folders")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the table to this page")
    arguments = parser.parse_args()
    folders = sorted(path for path in arguments.cases.iterdir() if path.is_dir())
    folders = [path.absolute() for path in folders if any(fnmatch(path.name, name) for name in arguments.only)]
    with ThreadPoolExecutor(2) as pool:
        markdown = table(list(pool.map(outcome, folders)))
    print(markdown)
    if arguments.write:
        arguments.write.write_text(f"# Cases\n\n{markdown}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
