"""Files that several tests of the stage read, made once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.gguf import GgufConfig
from tasks.gguf.kinds import KINDS
from tasks.gguf.staging import stage_for_converter, stored_type
from tests.gguf.architectures import ARCHITECTURES
from tests.merge.test_merge import pico_rows
from tests.pico import pico_model
from tests.rows import write_rows

# A random model's logits lie close together: quantization moves which comes first, so only the KL is held tightly.
LOOSE = {"min_top1": 0.3, "proof_rows": 4}
# All kinds that need no importance matrix where rows fill their blocks, and for the others one of each fallback.
ALL_KINDS = [name for name, kind in KINDS.items() if name not in (*FLOATS, "IQ3_XS") and not kind.needs_imatrix]
COMMON_KINDS = ["Q8_0", "Q4_K_M", "Q4_0"]


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
    process = subprocess.run(
        [*command, "--dataset", str(dataset), "--out", str(directory / "out")], capture_output=True
    )
    assert process.returncode == 0, process.stderr.decode()
    assert b"llama" not in process.stdout + process.stderr  # its messages are in the log, not on the terminal
    return directory / "out"


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories by architecture, with llama.cpp's files as `KIND.oracle` and the stage's as `KIND.stage`."""
    directory, orders = tmp_path_factory.mktemp("parity"), []
    for architecture in ARCHITECTURES:
        parent = directory / architecture.__name__
        model = architecture(parent / "model")
        stored = stored_type(model)
        kinds = ALL_KINDS if architecture.__name__ == "gemma3_wide" else COMMON_KINDS
        staged = stage_for_converter(model, parent / "staged")
        floats = FLOATS if architecture.__name__ == "gemma3" else [stored]
        orders.append({"model": str(staged), "stored": stored, "floats": list(floats), "kinds": kinds})
    (directory / "orders.json").write_text(json.dumps(orders))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"}
    running = {}
    for module in ("oracle_conversion", "stage_conversion"):  # in parallel
        command = [sys.executable, "-m", f"tests.gguf.{module}", str(directory / "orders.json")]
        with (directory / f"{module}.log").open("wb") as log:
            running[module] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    for module, child in running.items():
        assert child.wait() == 0, (directory / f"{module}.log").read_text()[-3000:]
    return directory
