"""pyproject.toml declares what the code imports, and nothing else."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = {"flows", "tasks", "deployments"}
NOT_IMPORTED = {
    "fastapi": "its version is what Prefect's server needs",
    "sentencepiece": "transformers reads tokenizer.model with it",
    "trl": "preference training",
}
PART_OF = {
    "botocore": "boto3",
    "mypy_boto3_s3": "boto3",  # types, for the type checker alone
    "pydantic_core": "pydantic",
    "annotated_types": "pydantic",
    "triton": "torch",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["gpu"], *extras["bakeoff"]]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]


def names() -> tuple[set[str], set[str]]:
    """Top-level modules that are imported, and those that strings name (`import_module`, `find_spec`, extensions)."""
    imported, named = set(), set()
    for path in (path for room in HOUSE for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
                named.add(node.value.split(".")[0])
    return imported - HOUSE - set(sys.stdlib_module_names), named


def test_what_is_imported_is_declared() -> None:
    distributions, known = packages_distributions(), declared()
    missing = {
        module: distributions.get(module, ["?"])
        for module in names()[0]
        if module in distributions
        and PART_OF.get(module) not in known
        and not known & {normal(name) for name in distributions[module]}
    }
    assert not missing


def test_what_is_declared_is_imported() -> None:
    imported, named = names()
    distributions = packages_distributions()
    used = {normal(name) for module in imported | named for name in distributions.get(module, [module])}
    assert declared() - used - {normal(name) for name in NOT_IMPORTED} == set()
