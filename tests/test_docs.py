"""Docs cannot go stale: the tree is made of the modules' own first lines, commands, variables and errors exist.

python -m tests.test_docs     writes the tree of docs/architecture.md anew
"""

import ast
import re
from pathlib import Path

from tasks.core.errors import BY_EXIT_CODE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TREE_PAGE = ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = ["flows", "tasks", "deployments", "docker"]
BEGIN, END = "<!-- tree -->\n```text\n", "```\n<!-- /tree -->\n"
ABOUT = {
    "docker": "images of the orchestrator (no torch) and the worker, and a compose file",
    "presets": "configs that say what differs from the defaults",
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
    """The tree's section of docs/architecture.md."""
    lines = [line for room in ROOMS for line in tree(ROOT / room)]
    return BEGIN + "\n".join(lines) + "\n" + END


def test_the_tree_is_the_house() -> None:
    assert written() in TREE_PAGE.read_text(), "run python -m tests.test_docs"


def test_every_module_says_what_it_is() -> None:
    silent = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if not first_line(path)]
    assert not silent


def test_ci_runs_the_command_that_the_readme_names() -> None:
    assert "make test " in README.read_text()
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)


def test_variables_in_the_docs_are_read() -> None:
    settings = (ROOT / "tasks/core/settings.py").read_text()
    for page in PAGES:
        for name in re.findall(r"STILLHOUSE_([A-Z_]+)", page.read_text()):
            if name != "ROOT":
                assert re.search(rf"^    {name.lower()}:", settings, flags=re.MULTILINE), (page.name, name)
    assert "STILLHOUSE_ROOT" in (ROOT / "deployments/prefect.yaml").read_text()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if "://" in target or path.startswith("mailto:"):
                continue
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".md":
                assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_modules_and_files_named_in_the_docs_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m ((?:tasks|flows|tests|deployments)[\w.]*\w)", text):
            stem = ROOT.joinpath(*module.split("."))
            assert stem.with_suffix(".py").exists() or (stem / "__init__.py").exists(), f"{page.name}: {module}"
        for file in re.findall(r"`((?:tasks|flows|tests|deployments|docker)/[\w./-]+\.(?:py|yaml|md|jsonl))`", text):
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_every_error_class_has_a_remedy() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    for code, error in BY_EXIT_CODE.items():
        retried = "yes" if error.retriable else "no"
        assert f"| `{error.__name__}` | {code} | {retried} |" in page, error.__name__


if __name__ == "__main__":
    text = TREE_PAGE.read_text()
    start = text.index("<!-- tree -->")
    end = text.index("<!-- /tree -->\n") + len("<!-- /tree -->\n")
    TREE_PAGE.write_text(text[:start] + written() + text[end:])
