"""The table of kinds: what is added there is known to config, form, plan, proof and command."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.gguf import GgufConfig
from tasks.gguf.conversion_plan import ModelLayout, make_plan, plans_by_size, require_imatrix
from tasks.gguf.kind_choice import candidate_plans
from tasks.gguf.kinds import KINDS, FileType, kinds_table
from tasks.gguf.plan_page import markdown
from tasks.gguf.proof import proof_budget

DOCS = Path(__file__).parents[2] / "docs" / "gguf.md"
SHAPES = {"token_embd.weight": (256, 32), "blk.0.attn_q.weight": (256, 256), "blk.0.attn_norm.weight": (256,)}
TYPES = {name: "BF16" if len(shape) > 1 else "F32" for name, shape in SHAPES.items()}
LAYOUT = ModelLayout("llama", 1, 1, {"general.architecture": 16}, "BF16", SHAPES, TYPES)


@pytest.fixture
def new_kind(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(KINDS, "Q5_K_X", FileType(99, "Q5_K", 0.123, 0.9, needs_imatrix=True, auto=True))
    return "Q5_K_X"


def test_a_kind_is_added_by_one_table_entry(new_kind: str) -> None:
    config = GgufConfig.model_validate({"kind": new_kind})
    assert new_kind in GgufConfig.model_json_schema()["properties"]["kind"]["enum"]
    assert proof_budget(config, new_kind) == (0.123, 0.9)
    plan = make_plan(LAYOUT, LAYOUT.options(config.kind))
    assert plan.types == {"F32": 1, "Q5_K": 1, "Q6_K": 1}
    with pytest.raises(ValueError, match=f"{new_kind} needs an importance matrix"):
        require_imatrix(plan)
    assert f"| {new_kind} |" in markdown(plans_by_size(LAYOUT, list(KINDS)))
    assert "| Q5_K_X | 5.5 | 0.123, 90% | needs an imatrix, tried by `auto` |" in kinds_table()


def test_auto_tries_an_added_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "Q6_X", FileType(98, "Q6_K", 0.1, 0.9, auto=True))
    for name in ("BF16", "Q8_0", "Q6_K"):
        monkeypatch.setitem(KINDS, name, KINDS[name]._replace(auto=False))
    (plan,) = candidate_plans(GgufConfig(kind="auto", budget_mb=1), LAYOUT, {}, None)
    assert plan.kind == "Q6_X"


def test_unknown_kinds_and_types_are_refused_with_the_valid_names() -> None:
    with pytest.raises(ValidationError, match="no 'Q9_0', only auto, F32, F16"):
        GgufConfig.model_validate({"kind": "Q9_0"})
    with pytest.raises(ValidationError, match="no 'Q4_K_M', only F32, F16"):
        GgufConfig.model_validate({"overrides": {"ffn": "Q4_K_M"}})


def test_the_docs_have_the_table() -> None:
    assert kinds_table() in DOCS.read_text(encoding="utf-8"), "python -m tasks.gguf.kinds prints it"


def test_the_command_prints_the_table() -> None:
    process = subprocess.run([sys.executable, "-m", "tasks.gguf.kinds"], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == kinds_table()
