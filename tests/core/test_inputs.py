"""What lies on a machine for stages to read: fetched once, removed when nobody wants it any more, never before."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.core.inputs import KEPT_SECONDS, fetched, in_use, remove_unused
from tasks.core.settings import Settings
from tasks.core.store import open_store


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def old(settings: Settings, tmp_path: Path) -> Path:
    """An input that was last wanted more than a week ago."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_text("1.5")
    digest = open_store(settings.store_uri).put(tmp_path / "made")
    return aged(fetched(settings, digest))


def aged(directory: Path) -> Path:
    then = time.time() - KEPT_SECONDS - 60
    os.utime(directory.with_name(directory.name + ".fetched"), (then, then))
    return directory


def test_what_nobody_wanted_for_a_week_goes_and_comes_back_when_wanted(settings: Settings, old: Path) -> None:
    scratch = settings.root / "scratch"
    (scratch / "teacher-1" / "work").mkdir(parents=True)
    for name in ("teacher-1.lock", "merge-2.lock"):
        (scratch / name).touch()
    remove_unused(settings)
    assert not list((settings.root / "inputs").iterdir())
    assert [path.name for path in scratch.iterdir()] == ["teacher-1"], "a stopped stage's checkpoints stay"
    assert (fetched(settings, old.name) / "weights").read_text() == "1.5"
    remove_unused(settings)
    assert old.is_dir()


def test_using_it_again_is_wanting_it(settings: Settings, old: Path) -> None:
    before = (old / "weights").stat().st_ctime_ns
    fetched(settings, old.name)
    remove_unused(settings)
    assert (old / "weights").stat().st_ctime_ns == before


def test_nothing_goes_while_another_process_runs_a_stage(settings: Settings, old: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tasks.core.inputs import in_use; from tasks.core.settings import "
        "Settings\nwith in_use(Settings(home=Path(sys.argv[1]))):\n  print('in', flush=True)\n  sys.stdin.read()"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code, str(settings.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert stage.stdout and stage.stdout.readline() == b"in\n"
    with in_use(settings):  # stages do not wait for each other
        remove_unused(settings)
    remove_unused(settings)
    assert old.is_dir()
    stage.kill()
    stage.communicate()
    remove_unused(settings)
    assert not old.exists()
