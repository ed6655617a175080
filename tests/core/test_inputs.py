"""Local copies of artifacts: fetched once, removed a week after their last use, never while a stage runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.core.inputs import RETENTION_SECONDS, fetch_input, inputs_in_use, remove_unused_inputs
from tasks.core.settings import Settings
from tasks.core.store import open_store


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def old(settings: Settings, tmp_path: Path) -> Path:
    """An input that was last used more than a week ago."""
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "weights").write_text("1.5")
    digest = open_store(settings.store_uri).put(tmp_path / "artifact")
    return aged(fetch_input(settings, digest))


def aged(directory: Path) -> Path:
    then = time.time() - RETENTION_SECONDS - 60
    os.utime(directory.with_name(directory.name + ".fetched"), (then, then))
    return directory


def test_an_input_unused_for_a_week_is_removed_and_fetched_when_needed(settings: Settings, old: Path) -> None:
    scratch = settings.root / "scratch"
    (scratch / "teacher-1" / "work").mkdir(parents=True)
    for name in ("teacher-1.lock", "merge-2.lock"):
        (scratch / name).touch()
    remove_unused_inputs(settings)
    assert not list((settings.root / "inputs").iterdir())
    assert [path.name for path in scratch.iterdir()] == ["teacher-1"], "a stopped stage's checkpoints stay"
    assert (fetch_input(settings, old.name) / "weights").read_text() == "1.5"
    remove_unused_inputs(settings)
    assert old.is_dir()


def test_another_use_keeps_an_input(settings: Settings, old: Path) -> None:
    before = (old / "weights").stat().st_ctime_ns
    fetch_input(settings, old.name)
    remove_unused_inputs(settings)
    assert (old / "weights").stat().st_ctime_ns == before


def test_no_input_is_removed_while_another_process_runs_a_stage(settings: Settings, old: Path) -> None:
    code = """
import sys
from pathlib import Path
from tasks.core.inputs import inputs_in_use
from tasks.core.settings import Settings
with inputs_in_use(Settings(home=Path(sys.argv[1]))):
    print("in", flush=True)
    sys.stdin.read()
"""
    stage = subprocess.Popen(
        [sys.executable, "-c", code, str(settings.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert stage.stdout and stage.stdout.readline() == b"in\n"
    with inputs_in_use(settings):  # stages do not wait for each other
        remove_unused_inputs(settings)
    remove_unused_inputs(settings)
    assert old.is_dir()
    stage.kill()
    stage.communicate()
    remove_unused_inputs(settings)
    assert not old.exists()
