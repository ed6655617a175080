"""The verdict in the plan: which tensors get better types for what a budget has left, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.job import Job
from tasks.gguf import GgufConfig
from tasks.gguf.audit_verdict import verdict_errors
from tasks.gguf.convert import open_conversion
from tasks.gguf.kind_choice import candidate_plans
from tasks.gguf.sensitive import best_raises, markdown

WORST = {"q8_0": 0.02, "q4_0": 0.4, "q4_k": 0.2, "q6_k": 0.02, "nf4": 0.5, "int8": 0.03}
MILD = {name: error / 100 for name, error in WORST.items()}


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """What the outliers stage says of two of the pico model's matrices, and of one in a tower."""
    names = {"layers.3.mlp.down_proj": WORST, "layers.1.self_attn.q_proj": MILD, "vision.fc": WORST}
    sensitive = [{"tensor": f"model.{name}.weight", "output_error": errors} for name, errors in names.items()]
    verdict = {"focus": "student", "models": {"student": {"sensitive": sensitive, "targets": {}}}}
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    return tmp_path


def test_the_largest_error_reduction_per_byte_is_first() -> None:
    tensors = [("bad", "Q4_0", (64, 512)), ("mild", "Q4_0", (64, 32)), ("float", "BF16", (64, 512))]
    errors = {"bad": WORST, "mild": MILD, "float": WORST, "elsewhere": WORST}
    step = 512 * 64 // 32 * (34 - 18)  # Q4_0 to Q8_0
    assert [(raised.name, raised.after, raised.bytes) for raised in best_raises(tensors, errors, step)] == [
        ("bad", "Q8_0", step)
    ]
    assert {raised.name for raised in best_raises(tensors, errors, 10**9)} == {"bad", "mild"}  # a float is not raised
    (cheaper,) = best_raises(tensors[:1], errors, step - 1)  # Q8_0 is one byte too much: Q5_1 and Q5_0 are not
    assert cheaper.after == "Q5_1" and cheaper.error_before == 0.4
    assert cheaper.error_after == pytest.approx(0.2 / 2**0.5)  # from Q5_0, which was tried: half a bit less
    assert not best_raises(tensors, errors, 10)


def test_the_plan_follows_the_verdict(audit: Path, bf16: Path, tmp_path: Path) -> None:
    config = GgufConfig(kind="Q4_0", overrides={"attn_v": "Q8_0"}, sensitive_percent=100)
    with open_conversion(bf16 / "model.gguf", "pico", Job(tmp_path / "work")) as conversion:
        layout = conversion.layout
        assert set(verdict_errors(audit, layout.architecture, layout.layers)) == {
            "blk.3.ffn_down.weight", "blk.1.attn_q.weight"
        }  # fmt: skip
        (advised,) = candidate_plans(config, conversion.layout, {}, None, audit)
        assert {entry.name: entry.after for entry in advised.advice} == {
            "blk.3.ffn_down.weight": "Q8_0", "blk.1.attn_q.weight": "Q8_0"
        }  # fmt: skip
        assert not advised.raised and "Q8_0" not in {
            entry.type for entry in advised.tensors if "ffn_down" in entry.name
        }
        follow = config.model_copy(update={"sensitive": "raise"})
        (plan,) = candidate_plans(follow, conversion.layout, {}, None, audit)
        types = {entry.name: entry.type for entry in plan.tensors}
        assert (types["blk.3.ffn_down.weight"], types["blk.2.ffn_down.weight"]) == ("Q8_0", "Q4_0")
        assert plan.bytes == advised.bytes + sum(entry.bytes for entry in plan.advice)
        assert "sensitive tensors raised: blk.3.ffn_down.weight Q4_0 to Q8_0" in plan.sentence()
        assert r'"^blk\\.3\\.ffn_down\\.weight$": "Q8_0"' in markdown(plan.advice, plan.raised)
        conversion.write(plan, tmp_path / "raised.gguf")
        assert (tmp_path / "raised.gguf").stat().st_size == plan.bytes
        first = min(plan.advice, key=lambda entry: entry.bytes / entry.error_before**2)
        tight = follow.model_copy(update={"budget_mb": (advised.bytes + first.bytes) / 1e6})
        (fits,) = candidate_plans(tight, conversion.layout, {}, None, audit)
        assert fits.bytes <= advised.bytes + first.bytes and fits.advice[0].name == "blk.3.ffn_down.weight"
        quality = GgufConfig(kind="auto", max_mean_kl=0.001, sensitive="raise")
        plans = candidate_plans(quality, conversion.layout, {}, None, audit)
        assert {plan.raised for plan in plans} == {True, False}
        assert [plan.bytes for plan in plans] == sorted(plan.bytes for plan in plans)


def test_the_file_sizes_command_prints_raised_types(audit: Path, bf16: Path) -> None:
    command = [sys.executable, "-m", "tasks.gguf.file_sizes", str(bf16 / "model.gguf"), "--kinds", "Q4_0", "BF16"]
    process = subprocess.run([*command, "--outliers", str(audit), "--budget-mb", "0.3"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Q4_0, raised by the verdict: blk.3.ffn_down.weight Q4_0 to Q8_0, blk.1.attn_q.weight" in process.stdout
    assert r'overrides: {"^blk\\.3\\.ffn_down\\.weight$": "Q8_0"' in process.stdout
    assert "BF16, raised" not in process.stdout and "| Q4_0 |" in process.stdout
