"""The bake-off stage with what is installed everywhere; a missing library and a failing method are rows as well."""

import importlib.util
import json
from pathlib import Path

import pytest

from tasks.bakeoff import BakeoffConfig
from tasks.bakeoff.run import bake
from tasks.bakeoff.table import draw, gguf_row, happened, markdown
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import write_rows
from tests.merge.test_merge import pico_rows
from tests.planted import plant

STUDENT = Path("deployments/quickstart/student")
FORETOLD = {"verdict": "unsafe", "because": ["the residual stream reaches 1e5"], "do": []}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    for name in ("calibration", "test"):
        write_rows(directory / f"{name}.jsonl", pico_rows(4))
    targets = dict.fromkeys(("bf16", "int8_activations"), FORETOLD | {"verdict": "safe"}) | {"fp16": FORETOLD}
    verdict = {"focus": "student", "models": {"student": {"targets": targets}}}
    (directory / "verdict.json").write_text(json.dumps(verdict))
    return directory


def row_of(model: Path, dataset: Path, out: Path, **config: object) -> dict:
    out.mkdir()
    options = BakeoffConfig(rows=4, calibration_rows=4, speed_tokens=4, **config)  # type: ignore[arg-type]
    bake(options, ModelDir(model), dataset, out, Job(out.with_suffix(".work")), outliers=dataset)
    return json.loads((out / "row.json").read_text())


def test_rows_and_their_table(dataset: Path, tmp_path: Path) -> None:
    planted = plant(STUDENT, tmp_path / "planted")
    rows = [
        row_of(STUDENT, dataset, tmp_path / "bf16"),
        row_of(STUDENT, dataset, tmp_path / "nf4", method="bnb-nf4"),
        row_of(planted, dataset, tmp_path / "fp16", dtype="float16"),
        row_of(STUDENT, dataset, tmp_path / "quanto", method="quanto-int4-uncalibrated"),
        gguf_row({"format": "Q4_0", "bytes": 10**6, "mean_kl": 0.2, "top1": 0.9}, 1.5, imatrix=True, weighed=7),
        gguf_row({"format": "Q8_0", "bytes": 10**6, "mean_kl": 0.3, "top1": 0.9}, 1.5, imatrix=True, weighed=0),
    ]
    bf16, nf4, fp16, quanto, *_ = rows
    assert bf16["mean_kl"] < 1e-2 and bf16["tokens_per_second"] > 0 and bf16["predicted"] == happened(bf16) == "safe"
    weights = (STUDENT / "model.safetensors").stat().st_size
    assert bf16["bytes"] == pytest.approx(weights, rel=0.05)
    assert nf4["bytes"] < 0.5 * bf16["bytes"] and nf4["mean_kl"] > bf16["mean_kl"]
    assert fp16["predicted"] == "unsafe" and happened(fp16).startswith("unsafe")
    assert fp16["not_finite"] == fp16["tokens"] > 0
    assert quanto["predicted"] == "unsafe"
    if importlib.util.find_spec("optimum") is None:
        assert happened(quanto) == "skipped: not installed: optimum"
    lines = markdown(rows).splitlines()
    assert len(lines) == 8 and lines[2].startswith("| none | bfloat16 |")
    assert "| GGUF Q4_0 + imatrix |" in markdown(rows) and "| GGUF Q8_0, imatrix unused |" in markdown(rows)
    draw(rows, tmp_path / "bakeoff.png")
    assert (tmp_path / "bakeoff.png").stat().st_size > 10_000


def test_a_method_that_fails_is_a_row(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.bakeoff.methods import METHODS  # noqa: PLC0415

    def torn(source: object) -> None:
        raise RuntimeError("Hessian inversion failed\nand more")

    monkeypatch.setitem(METHODS, "none", torn)  # type: ignore[arg-type]
    row = row_of(STUDENT, dataset, tmp_path / "out")
    assert happened(row) == "failed: RuntimeError: Hessian inversion failed"
    assert "-" in markdown([row])
