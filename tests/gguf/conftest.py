"""Files that several tests of the stage read, made once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.rows import write_rows
from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.gguf import GgufConfig
from tasks.gguf.hf_directory import stage, stored_type
from tasks.gguf.kinds import KINDS, NEED_IMATRIX
from tests.gguf.architectures import ARCHITECTURES
from tests.merge.test_merge import pico_rows
from tests.pico import pico_model

# A random model's logits lie close together: quantization moves which comes first, so only the KL is held tightly.
LOOSE = {"min_top1": 0.3, "proof_rows": 4}
# All kinds that need no importance matrix where rows fill their blocks, and for the others one of each fallback.
ALL = [kind for kind in KINDS if kind not in (*FLOATS, *NEED_IMATRIX, "IQ3_XS")]
FEW = ["Q8_0", "Q4_K_M", "Q4_0"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    write_rows(directory / "test.jsonl", pico_rows(8))
    (directory / "provenance.json").write_text('{"commit": "abc", "inputs": {"files": {"name": "' + 64 * "a" + '"}}}')
    return directory


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("gguf") / "narrow", hidden=64, layers=6)


@pytest.fixture(scope="session")
def bf16(narrow: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's command with kind BF16: a GGUF that the other kinds are quantized from."""
    directory = tmp_path_factory.mktemp("bf16")
    (directory / "config.json").write_text(GgufConfig(kind="BF16", **LOOSE).model_dump_json())
    command = [sys.executable, "-m", "tasks.gguf.run", str(directory / "config.json"), "--model", str(narrow)]
    ran = subprocess.run([*command, "--dataset", str(dataset), "--out", str(directory / "out")], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"llama" not in ran.stdout + ran.stderr  # its messages are in the log, not on the terminal
    return directory / "out"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories by architecture, with llama.cpp's files as `KIND.oracle` and ours as `KIND.ours`."""
    directory, orders = tmp_path_factory.mktemp("parity"), []
    for architecture in ARCHITECTURES:
        place = directory / architecture.__name__
        model = architecture(place / "model")
        stored = stored_type(model)
        kinds = ALL if architecture.__name__ == "gemma3_wide" else FEW
        staged = stage(model, place / "staged")
        floats = FLOATS if architecture.__name__ == "gemma3" else [stored]
        orders.append({"model": str(staged), "stored": stored, "floats": list(floats), "kinds": kinds})
    (directory / "orders.json").write_text(json.dumps(orders))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"}
    running = {}
    for whose in ("oracle", "ours"):  # side by side
        command = [sys.executable, "-m", f"tests.gguf.{whose}", str(directory / "orders.json")]
        with (directory / f"{whose}.log").open("wb") as log:
            running[whose] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for whose, process in running.items():
        assert process.wait() == 0, (directory / f"{whose}.log").read_text()[-3000:]
    return directory
