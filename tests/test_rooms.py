"""The rooms of the house: no circle of imports among modules, no base name twice below the engine.

`.importlinter` holds what a package may import; circles between modules of different packages are found here.
"""

from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

import tasks.engine


@pytest.fixture(scope="module")
def imports():
    """Module -> modules that it imports, of flows and tasks."""
    graph = grimp.build_graph("flows", "tasks", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """A circle of imports, first module last again; empty without one."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_through_others(imports):
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}), "a circle is found where there is one"
    assert not circle_of(imports)


def test_no_base_name_stands_twice_below_the_engine():
    root = Path(tasks.engine.__file__).parent
    names = Counter(path.stem for path in root.rglob("*.py") if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []
