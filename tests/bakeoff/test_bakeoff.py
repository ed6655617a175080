"""The bake-off stage and its registry of methods; a missing library and a failing method are rows as well."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.bakeoff import every_method
from flows.reference import type_of
from tasks.bakeoff import METHODS, BakeoffConfig
from tasks.bakeoff.prediction import predict
from tasks.bakeoff.registry import Method, method
from tasks.bakeoff.run import bake
from tasks.bakeoff.table import draw, gguf_row, happened, markdown
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tests.merge.test_merge import pico_rows
from tests.planted import plant
from tests.rows import write_rows

STUDENT = Path("deployments/quickstart/student")
UNSAFE = {"verdict": "unsafe", "because": ["the residual stream reaches 1e5"], "do": []}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    for name in ("calibration", "test"):
        write_rows(directory / f"{name}.jsonl", pico_rows(4))
    targets = dict.fromkeys(("bf16", "int8_activations"), UNSAFE | {"verdict": "safe"}) | {"fp16": UNSAFE}
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
        gguf_row({"format": "Q4_0", "bytes": 10**6, "mean_kl": 0.2, "top1": 0.9}, 1.5, imatrix=True, weighed_tensors=7),
        gguf_row({"format": "Q8_0", "bytes": 10**6, "mean_kl": 0.3, "top1": 0.9}, 1.5, imatrix=True, weighed_tensors=0),
    ]
    bf16, nf4, fp16, quanto, *_ = rows
    assert bf16["mean_kl"] < 1e-2 and bf16["tokens_per_second"] > 0 and bf16["predicted"] == happened(bf16) == "safe"
    weights = (STUDENT / "model.safetensors").stat().st_size
    assert bf16["bytes"] == pytest.approx(weights, rel=0.05)
    assert nf4["bytes"] < 0.5 * bf16["bytes"] and nf4["mean_kl"] > bf16["mean_kl"]
    assert fp16["predicted"] == "unsafe" and happened(fp16).startswith("unsafe")
    assert fp16["not_finite"] == fp16["tokens"] > 0
    assert quanto["predicted"] == "unsafe"
    if METHODS["quanto-int4-uncalibrated"].cannot_run("cuda"):
        assert happened(quanto) == "skipped: not installed: optimum-quanto"
    lines = markdown(rows).splitlines()
    assert len(lines) == 8 and lines[2].startswith("| none | bfloat16 |")
    assert "| GGUF Q4_0 + imatrix |" in markdown(rows) and "| GGUF Q8_0, imatrix unused |" in markdown(rows)
    draw(rows, tmp_path / "bakeoff.png")
    assert (tmp_path / "bakeoff.png").stat().st_size > 10_000


def test_failing_method_is_a_row(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object) -> None:
        raise RuntimeError("Hessian inversion failed\nand more")

    monkeypatch.setitem(METHODS, "none", METHODS["none"]._replace(quantize=fail))
    row = row_of(STUDENT, dataset, tmp_path / "out")
    assert happened(row) == "failed: RuntimeError: Hessian inversion failed"
    assert "-" in markdown([row])


@pytest.fixture
def int8_everything(monkeypatch: pytest.MonkeyPatch) -> Method:
    """A method that a decorator adds, and that the test takes out again."""
    monkeypatch.setitem(METHODS, "dummy", METHODS["none"])

    @method("dummy", "int8 everywhere", library="no-such-library", targets=("int8_activations",))
    def quantize(source: object) -> None:
        raise AssertionError("must not run without its library")

    return METHODS["dummy"]


def test_decorated_function_is_a_method(int8_everything: Method, dataset: Path, tmp_path: Path) -> None:
    """One object adds it to the config, the form's choices, the flow's list, the prediction and the skipped rows."""
    assert BakeoffConfig(method="dummy").method == "dummy"
    with pytest.raises(ValidationError, match="there is no 'dumy', only none, bnb-int8, .*, dummy"):
        BakeoffConfig(method="dumy")
    assert BakeoffConfig.model_json_schema()["properties"]["method"]["enum"] == list(METHODS)
    assert "`awq`, `dummy`" in type_of(BakeoffConfig.model_fields["method"])
    assert [config.method for config in every_method()].count("dummy") == 2
    verdict = {"models": {"it": {"targets": {name: UNSAFE for name in ("int8_activations",)}}}, "focus": "it"}
    verdict["models"]["it"]["targets"]["bf16"] = UNSAFE | {"verdict": "safe"}  # type: ignore[index]
    assert predict(int8_everything, "bfloat16", verdict) == {"predicted": "unsafe", "because": UNSAFE["because"][0]}
    row = row_of(STUDENT, dataset, tmp_path / "out", method="dummy")
    assert row["title"] == "int8 everywhere" and row["predicted"] == "safe"
    assert happened(row) == "skipped: not installed: no-such-library" and "| dummy | bfloat16 | - |" in markdown([row])


def test_method_that_needs_a_gpu_is_skipped_on_a_cpu() -> None:
    awq = METHODS["awq"]._replace(library="")
    assert awq.cannot_run("cpu") == "needs a GPU, and runs on cpu" and awq.cannot_run("cuda") is None
