"""The README cannot go stale: its tree is made of the modules' own first lines, its commands are the ones CI runs.

python -m tests.test_readme     writes the tree anew
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ROOMS = ["flows", "tasks", "deployments", "docker"]
BEGIN, END = "<!-- tree -->\n```text\n", "```\n<!-- /tree -->\n"
ABOUT = {
    "docker": "images of the orchestrator (no torch) and the worker, and a compose file",
    "presets": "full configs, written by write_presets.py",
    "data": "the quickstart's rows",
    "teacher": "the quickstart's tiny teacher base",
    "student": "the quickstart's tiny student base",
}


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n")[0].removesuffix(".")


def tree(directory: Path, depth: int = 0) -> list[str]:
    """One line a module, the folder's own line from its `__init__`."""
    own = directory / "__init__.py"
    about = first_line(own) if own.exists() else ABOUT.get(directory.name, "")
    lines = [f"{'  ' * depth}{directory.name + '/':{24 - 2 * depth}} {about}".rstrip()]
    inner = sorted(directory.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in inner:
        if path.is_dir() and not path.name.startswith(("_", ".")):
            lines += tree(path, depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(f"{'  ' * (depth + 1)}{path.name:{22 - 2 * depth}} {first_line(path)}")
    return lines


def written() -> str:
    """The tree's section of the README."""
    lines = [line for room in ROOMS for line in tree(ROOT / room)]
    return BEGIN + "\n".join(lines) + "\n" + END


def test_the_tree_is_the_house() -> None:
    assert written() in README.read_text(), "run python -m tests.test_readme"


def test_every_module_says_what_it_is() -> None:
    silent = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if not first_line(path)]
    assert not silent


def test_ci_runs_the_command_that_the_readme_names() -> None:
    assert "make test " in README.read_text()
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)


def test_variables_in_the_readme_are_read() -> None:
    settings = (ROOT / "tasks/core/settings.py").read_text()
    for name in re.findall(r"STILLHOUSE_([A-Z_]+)", README.read_text()):
        if name != "ROOT":
            assert re.search(rf"^    {name.lower()}:", settings, flags=re.MULTILINE), name
    assert "STILLHOUSE_ROOT" in (ROOT / "deployments/prefect.yaml").read_text()


if __name__ == "__main__":
    text = README.read_text()
    old = text[text.index(BEGIN) : text.index(END) + len(END)]
    README.write_text(text.replace(old, written()))
