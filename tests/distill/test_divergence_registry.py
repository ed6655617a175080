"""A divergence is added by one file: config, form, training and report have it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core.config import idle_settings
from tasks.distill import DistillConfig
from tasks.engine.losses.divergence import Divergence, Parameter
from tasks.engine.losses.divergence_registry import DIVERGENCES, markdown_table, parameter_settings
from tests.distill.runs import SETTINGS, run

ROOT = Path(__file__).parents[2]
DUMMY = '''
from tasks.engine.losses.divergence import Divergence, Parameter

def brier(logp, logq, q, scale):
    """D = scale sum (p - q)^2, q dD/dq = 2 scale q (q - p)."""
    difference = q - logp.exp()
    return scale * difference.square().sum(-1), 2 * scale * q * difference

SCALE = Parameter(setting="brier_scale", default=1, help="Factor of `brier`.", bounds={"gt": 0})
DIVERGENCE = Divergence("brier", "Brier score", "Σ (p - q)²", "Brier 1950", brier, {"scale": SCALE})
'''
# The directory of further divergences is found before anything reads the registry.
RUN = """
import json, sys
from pathlib import Path
from tasks.engine.losses import divergences
divergences.__path__.append(sys.argv[1])
from flows.config import PipelineConfig
from tasks.distill import DistillConfig
assert "torch" not in sys.modules
form = PipelineConfig.model_json_schema()["$defs"]["DistillConfig"]["properties"]
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill.run import distil
student, teacher, dataset, cache, work, out = map(Path, sys.argv[2:8])
config = DistillConfig(**json.loads(sys.argv[8]))
report = distil(config, ModelDir(student), ModelDir(teacher), dataset, out, Job(work), teacher_cache=cache)
print(json.dumps({"form": form, "report": report.model_dump(mode="json")}))
"""


def test_one_file_adds_a_divergence(student, teacher, dataset, cached_base, tmp_path):
    folder, out = tmp_path / "divergences", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "brier.py").write_text(DUMMY)
    settings = SETTINGS | {"divergence": "brier", "brier_scale": 2, "learning_rate": 1e-2, "max_steps": 20}
    arguments = [folder, student.base, teacher.base, dataset, cached_base, tmp_path / "work", out, json.dumps(settings)]
    process = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    output = json.loads(process.stdout.splitlines()[-1])
    assert (
        "brier" in output["form"]["divergence"]["enum"] and "Brier score" in output["form"]["divergence"]["description"]
    )
    assert output["form"]["brier_scale"]["exclusiveMinimum"] == 0
    metrics, details = output["report"]["metrics"], output["report"]["details"]["divergence"]
    assert 0 < metrics["train_kd_loss"] < 2 * 4 * 2  # T^2 and the scale times the largest Brier score
    assert (details["name"], details["title"], details["parameters"]) == ("brier", "Brier score", {"scale": 2})
    assert output["report"]["facts"]["divergence"] == "brier"


@pytest.mark.parametrize("divergence", ["total_variation", "alpha_beta"])
@pytest.mark.parametrize("source", [{}, {"states_budget_gib": 0, "top_k": 64}])
def test_divergences_without_a_kernel_train_from_hidden_states_and_a_top_k(
    student, teacher, dataset, cache, tmp_path, divergence, source
):
    settings = dict(divergence=divergence, learning_rate=1e-2, max_steps=20, kd_weight=1, ce_weight=0, **source)
    report = run(student, teacher, dataset, tmp_path, None if source else cache, **settings)
    steps = [json.loads(line) for line in (tmp_path / "work" / "events.jsonl").read_text().splitlines()]
    first = next(step["values"] for step in steps if step["event"] == "metrics" and "kd_grad_norm" in step["values"])
    assert report.metrics["validation_kd_loss"] < first["kd_loss"] and first["kd_grad_norm"] > 0
    assert report.details["divergence"]["name"] == divergence


def test_the_config_has_the_registrys_choices_parameters_and_bounds():
    schema = DistillConfig.model_json_schema()["properties"]
    assert schema["divergence"]["enum"] == list(DIVERGENCES)
    for setting, parameter in parameter_settings(DIVERGENCES).items():
        assert schema[setting]["default"] == parameter.default and parameter.help in schema[setting]["description"]
    with pytest.raises(ValueError, match="divergence\n  Input should be 'forward_kl'"):
        DistillConfig(divergence="hinge")
    with pytest.raises(ValueError, match="ab_alpha\n  Input should be less than or equal to 2"):
        DistillConfig(divergence="alpha_beta", ab_alpha=3)
    assert DistillConfig(divergence="alpha_beta", ab_beta=0).divergence_parameters == {"ab_alpha": 0.2, "ab_beta": 0}


def test_a_parameter_of_another_divergence_is_idle():
    idle = dict(idle_settings(DistillConfig(divergence="jsd", jsd_beta=0.3, skew=0.2), DistillConfig()))
    assert idle.keys() == {"skew"} and idle["skew"].condition == "divergence: skew_kl or skew_reverse_kl"


def test_two_divergences_share_a_setting_only_where_it_is_the_same():
    registry = {
        name: Divergence(name, "", "", "", lambda: None, {"alpha": Parameter("skew", default, "")})
        for name, default in (("first", 0.1), ("second", 0.2))
    }
    with pytest.raises(ValueError, match="define the config field skew differently"):
        parameter_settings(registry)


def test_the_documentation_has_the_registrys_table():
    page = (ROOT / "docs" / "distillation.md").read_text()
    assert markdown_table(DIVERGENCES) in page, "run python -m tests.distill.test_divergence_registry"


if __name__ == "__main__":  # writes the table anew
    path = ROOT / "docs" / "distillation.md"
    text = path.read_text()
    start = text.index("| `divergence` |")
    path.write_text(text[:start] + markdown_table(DIVERGENCES) + text[text.index("\n\n", start) :])
