"""The machine and its services: libraries, card, C compiler, store, disk, MLflow. Imports no torch."""

import os
import shutil
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

from flows.cards import Card, smallest_card
from flows.flow_config import FlowConfig
from flows.preflight.needs import GB, cuda_settings, needed_bytes, torch_stack
from tasks.core.errors import StageError
from tasks.core.mlflow_connection import without_password
from tasks.core.settings import Settings
from tasks.core.store import open_store
from tasks.preflight import Check

COMPILERS = ("cc", "gcc", "clang")
SECONDS = 5.0


def check_machine(config: FlowConfig | None, settings: Settings) -> tuple[float | None, list[Check]]:
    """The smallest card's GiB, and the checks."""
    groups = (getattr(config, name, None) for name in ("teacher", "student"))
    card = smallest_card(max((group.processes for group in groups if group is not None), default=1))
    checks = [
        *_libraries(config),
        _device(config, card),
        *(_compiler() if card else ()),
        _store(settings),
        *_disk(config, settings),
        _mlflow(settings),
    ]
    return (card.gib if card else None), checks


def _device(config: FlowConfig | None, card: Card | None) -> Check:
    if card:
        return Check("device", "ok", f"{card.name}, {card.gib:.1f} GiB")
    if config and (settings := cuda_settings(config)):
        remedy = "change them, or run it where a CUDA device is"
        return Check("device", "fail", f"no CUDA device, and these settings need one: {', '.join(settings)}", remedy)
    return Check("device", "ok", "no CUDA device: stages run on the CPU")


def _libraries(config: FlowConfig | None) -> Iterator[Check]:
    names = torch_stack(config)
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        remedy = "pip install 'stillhouse[gpu]'"
        yield Check("torch stack", "fail", f"not installed here: {', '.join(missing)}", remedy)
    else:
        yield Check("torch stack", "ok", f"{len(names)} libraries of the stages are installed")


def _compiler() -> Iterator[Check]:
    """Triton compiles a launcher for each kernel with the C compiler and Python's headers."""
    chosen_compiler = os.environ.get("CC")
    compiler = (
        shutil.which(chosen_compiler) if chosen_compiler else next(filter(None, map(shutil.which, COMPILERS)), None)
    )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        yield Check("C compiler", "fail", "none found, and Triton needs one", "apt-get install gcc, or set CC")
    elif not header.exists():
        yield Check("C compiler", "fail", f"{header} is missing, and Triton needs it", "apt-get install python3-dev")
    else:
        yield Check("C compiler", "ok", compiler)


def _store(settings: Settings) -> Check:
    try:
        open_store(settings.store_uri).check()
    except (StageError, OSError) as error:
        return Check("store", "fail", str(error), "see STILLHOUSE_STORE and the credentials in the environment")
    return Check("store", "ok", f"{settings.store_uri} can be written and read")


def _disk(config: FlowConfig | None, settings: Settings) -> Iterator[Check]:
    """Free space where the store and the scratch directory are, against what the run will about write."""
    free = shutil.disk_usage(settings.root).free
    if config is None:
        yield Check("disk", "ok", f"{free / GB:.1f} GB free at {settings.root}")
        return
    least, likely = needed_bytes(config, store_on_disk=settings.store_uri.startswith("file:"))
    result = f"{free / GB:.1f} GB free at {settings.root}; the run writes about {likely / GB:.1f} GB"
    remedy = "free some, or move STILLHOUSE_HOME to a larger disk"
    fresh = not (settings.root / "inputs").exists()  # else an earlier run may have stored all that this one needs
    yield Check("disk", "fail" if fresh and free < least else "warn" if free < likely else "ok", result, remedy)


def _mlflow(settings: Settings) -> Check:
    uri = settings.tracking_uri
    if not uri.startswith("http"):
        return Check("MLflow", "ok", f"records in {without_password(uri)}")
    server = without_password(uri).rstrip("/")  # urllib would take a password for a part of the host's name
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=SECONDS):
            return Check("MLflow", "ok", f"{server} answers")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Check("MLflow", "ok", f"{server} answers, and asks for credentials")
        reason: object = error
    except (OSError, HTTPException, ValueError) as error:
        reason = error
    remedy = "see MLFLOW_TRACKING_URI; without it the run goes on and is recorded later"
    return Check("MLflow", "warn", f"{server} does not answer: {reason}", remedy)
