"""What changes a cache key, and what does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core import cache
from tasks.core.refs import AdapterRef, DatasetRef, ModelRef
from tasks.ingest import IngestConfig

A, B = "a" * 64, "b" * 64


def model(digest: str) -> ModelRef:
    return ModelRef(uri="file:///s", digest=digest)


def test_config_and_input_digests_change_the_key() -> None:
    key = cache.cache_key("ingest", IngestConfig(), {"files": model(A)})
    assert key == cache.cache_key("ingest", IngestConfig(), {"files": model(A), "tokenizer": None})
    assert key != cache.cache_key("ingest", IngestConfig(seed=99), {"files": model(A)})
    assert key != cache.cache_key("ingest", IngestConfig(), {"files": model(B)})
    assert key != cache.cache_key("evaluate", IngestConfig(), {"files": model(A)})


def test_the_store_and_the_facts_do_not() -> None:
    local = DatasetRef(uri="file:///s", digest=A, facts={"rows": 1})
    remote = DatasetRef(uri="s3://bucket", digest=A)
    assert cache.cache_key("ingest", IngestConfig(), {"x": local}) == cache.cache_key(
        "ingest", IngestConfig(), {"x": remote}
    )


def test_an_adapter_counts_with_its_base_and_models_with_their_names() -> None:
    adapter = AdapterRef(uri="file:///s", digest=A, base=model(A))
    other = AdapterRef(uri="file:///s", digest=A, base=model(B))
    keys = {
        cache.cache_key("ingest", IngestConfig(), inputs)
        for inputs in ({"m": adapter}, {"m": other}, {"m": {"x": adapter}}, {"m": {"y": adapter}})
    }
    assert len(keys) == 4


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small house: two stages, one of which uses the engine."""
    for name, text in {
        "tasks/core/cache.py": "",
        "tasks/engine/models/load.py": "def load():\n    return 1\n",
        "tasks/one/run.py": "from tasks.engine.models.load import load\n",
        "tasks/two/run.py": "def two():\n    'Says two.'\n    return 2  # always\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "tasks/core/cache.py"))
    return tmp_path


def digests() -> tuple[str, str]:
    cache.code_digest.cache_clear()
    return cache.code_digest("tasks.one.run"), cache.code_digest("tasks.two.run")


def test_code_reached_through_imports_counts_and_nothing_else(tree: Path) -> None:
    def keys() -> list[str]:
        return [cache.cache_key(stage, IngestConfig(), {"files": model(A)}) for stage in ("one", "two")]

    (first, second), (key, other) = digests(), keys()
    (tree / "tasks/engine/models/load.py").write_text("def load():\n    return 2\n")
    changed, same = digests()
    assert changed != first and same == second
    assert keys()[0] != key and keys()[1] == other


def test_modules_that_a_registry_discovers_count(tree: Path) -> None:
    rules = tree / "tasks/engine/rules"
    rules.mkdir()
    (rules / "__init__.py").write_text("")
    (rules / "first.py").write_text("RULE = 1\n")
    registry = "import pkgutil\nfrom tasks.engine import rules\nRULES = list(pkgutil.iter_modules(rules.__path__))\n"
    (tree / "tasks/engine/models/load.py").write_text(registry)
    earlier = {digests()[0]}
    (rules / "first.py").write_text("RULE = 2\n")
    earlier.add(digests()[0])
    (rules / "second.py").write_text("RULE = 3\n")
    assert digests()[0] not in earlier and len(earlier) == 2


def test_comments_docstrings_and_formatting_do_not_count(tree: Path) -> None:
    before = digests()
    (tree / "tasks/two/run.py").write_text("def two():\n    '''Says two, loudly.'''\n\n    return (2)\n")
    assert digests() == before
    (tree / "tasks/two/run.py").write_text("def two():\n    return 3\n")
    assert digests() != before


def test_every_real_stage_has_a_digest_without_importing_torch() -> None:
    code = (
        "import sys; from tasks.core.cache import _imported_sources\n"
        "stages = 'ingest teacher distill outliers merge gguf evaluate gate bakeoff distill.teacher_cache'\n"
        "for stage in stages.split():\n"
        "    assert f'tasks.{stage}.run' in _imported_sources(f'tasks.{stage}.run'), stage\n"
        "assert 'tasks.engine.models.load' in _imported_sources('tasks.teacher.run')\n"
        "assert 'tasks.engine.losses.divergences.jsd' in _imported_sources('tasks.distill.run')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
