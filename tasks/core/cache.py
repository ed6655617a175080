"""Cache key of a stage: sha256 of its name, the code that makes its output, its config and its inputs' digests."""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from tasks.core.config import StageConfig
from tasks.core.refs import Ref

# The shell's side of core: how a stage is supervised and stored does not change its output.
NOT_CODE_OF_OUTPUT = {"tasks.core.errors", "tasks.core.job", "tasks.core.command", "tasks.core.provenance"}


def cache_key(stage: str, config: StageConfig, inputs: Mapping[str, Ref | Mapping[str, Ref] | None]) -> str:
    """The cache key (64 hex digits) of an output of `tasks.<stage>.run`."""
    parts = {
        "stage": stage,
        "code": code_digest(f"tasks.{stage}.run"),
        "config": config.model_dump(mode="json"),
        "inputs": {name: _digests(ref) for name, ref in sorted(inputs.items()) if ref is not None},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digests(ref: "Ref | Mapping[str, Ref]") -> object:
    if isinstance(ref, Mapping):
        return {name: _digests(value) for name, value in sorted(ref.items())}
    return [ref.digest, ref.base.digest] if ref.kind == "adapter" else ref.digest


@lru_cache(maxsize=64)
def code_digest(module: str) -> str:
    """sha256 over the source of a module and of every module of `tasks` that it imports, directly or not.

    Comments, docstrings and formatting do not count: the syntax tree is hashed, not the text.
    """
    sources = {name: ast.dump(tree) for name, tree in sorted(_imported_sources(module).items())}
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def _imported_sources(module: str) -> dict[str, ast.Module]:
    trees: dict[str, ast.Module] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        path = _source(name)
        if path is None or name in trees or name in NOT_CODE_OF_OUTPUT:
            continue
        tree = ast.parse(path.read_bytes())
        trees[name] = _WithoutDocstrings().visit(tree)
        imported = list(_imports(tree))
        queue += imported
        if _discovers_modules(tree):
            queue += (module for package in imported for module in _modules(package))
    return trees


def _discovers_modules(tree: ast.Module) -> bool:
    """Whether a module imports what `pkgutil.iter_modules` lists, as a registry does with the modules of a package."""
    return any(isinstance(node, ast.Attribute) and node.attr == "iter_modules" for node in ast.walk(tree))


def _modules(package: str) -> list[str]:
    """The modules directly in a package of `tasks`; none for a module."""
    path = _source(package)
    if path is None or path.name != "__init__.py":
        return []
    return [f"{package}.{file.stem}" for file in sorted(path.parent.glob("*.py"))]


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names in import statements anywhere in the tree; `from package import module` gives both."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _source(name: str) -> Path | None:
    """The file of a module of `tasks`, located without importing anything; None for everything else."""
    if not name.startswith("tasks."):
        return None
    stem = Path(__file__).parents[2].joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:  # noqa: N802
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node
