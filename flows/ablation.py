"""What makes a student good: the teacher, the number format it was trained in, or the teacher's norms? One table.

python -m flows.ablation deployments/presets/ablation.yaml

rows ── ingest ── teacher ──┬── cache ───── KD ────────────────────────┐
                            └── clip norms ── cache ───── KD clipped ──┤
student base ───────────────┬── SFT ───────────────────────────────────┼── evaluate, also as NF4 ── pairs ── report
                            └── SFT NF4 ───────────────────────────────┘
"""

from importlib.util import find_spec
from typing import Any, Self

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.checks import require_revisions_of_models, require_separate_rows
from flows.config import files_by_split, without_teacher
from flows.flow_config import FlowConfig
from flows.report import publish
from flows.report import show as show_models
from flows.stages import Stages
from flows.start import start
from tasks.core.import_inputs import import_files, import_model
from tasks.core.inputs import fetch_input
from tasks.core.metrics import primary_metric
from tasks.core.paired_comparison import Prediction, compare_slices, read_predictions
from tasks.core.plain_text import visible
from tasks.core.refs import AnyModel, DatasetRef, ReportRef
from tasks.distill import DistillConfig
from tasks.distill.task import distil
from tasks.distill.teacher_cache.task import cache_teacher
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.task import evaluate
from tasks.ingest import IngestConfig
from tasks.ingest.task import ingest
from tasks.merge import MergeConfig
from tasks.merge.task import merge
from tasks.teacher import FineTuneConfig
from tasks.teacher.task import fine_tune

CLIPPED, AS_NF4 = "teacher clipped", " as NF4"
ARMS = ("SFT", "KD", "SFT NF4", "KD clipped")
KINDS = {"teacher": "teacher", CLIPPED: "teacher", "student-base": "base", "SFT": "direct", "SFT" + AS_NF4: "direct"}
PAIRS = {
    "what the teacher buys": ("SFT", "KD"),
    "what training on NF4 costs": ("SFT", "SFT NF4"),
    "what clipping costs the teacher": ("teacher", CLIPPED),
    "what it costs the student": ("KD", "KD clipped"),
    "what loading as NF4 costs": ("SFT", "SFT" + AS_NF4),
    "the same of the distilled": ("KD", "KD" + AS_NF4),
    "the same of what was trained on NF4": ("SFT NF4", "SFT NF4" + AS_NF4),
}
SLICES = ("all", "in scope", "out of scope")


class AblationConfig(FlowConfig):
    """The same student trained four ways on the same rows, for the same steps, and compared pair by pair."""

    model_config = ConfigDict(title="Ablation")

    train: str
    """Training rows, as the pipeline takes them."""
    validation: str | None = None
    """Rows for the validation loss; without it a part of `train` is held back."""
    test: str | None = None
    """Held-out rows that every model is evaluated on; without it a part of `train` is held back."""
    text: str | None = None
    """General text that no model was trained on (a .txt file): its perplexity shows what a model forgot."""
    teacher_base: str
    """The teacher's base: a name on the Hugging Face hub or a local directory."""
    student_base: str
    """The student's base, with the teacher's tokenizer."""
    revision: dict[str, str] = {}
    """Hub revisions to pin, by name."""
    ingest: IngestConfig = IngestConfig()
    teacher: FineTuneConfig = FineTuneConfig()
    """How the teacher is fine-tuned on the rows."""
    student: DistillConfig = DistillConfig(method="lora", learning_rate=2e-4)
    """How every student is trained. With `method: full` the one on NF4 differs in more than its base's numbers: 4-bit
    weights cannot be trained, so it trains adapters."""
    nf4_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate on NF4; by default the student's. Adapters want about four times what all weights do."""
    clip_percentile: float = Field(99, gt=50, le=100)
    """Percentile at which each of the teacher's norms is clipped, for the student of a clipped teacher."""
    evaluate: EvaluateConfig = EvaluateConfig(latency_rows=0)

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        require_revisions_of_models(self.revision, (self.teacher_base, self.student_base))
        require_separate_rows(self.train, validation=self.validation, test=self.test)
        return self

    @property
    def nf4(self) -> FineTuneConfig:
        """The settings of the student that is trained on a base in NF4."""
        sft = without_teacher(self.student)
        rate = self.nf4_learning_rate or sft.learning_rate
        return FineTuneConfig.model_validate(sft.model_dump() | {"method": "qlora", "learning_rate": rate})


@flow(name="stillhouse-ablation", validate_parameters=True, persist_result=False)
def ablation(config: AblationConfig) -> dict[str, Any]:
    """Trains the student four ways and says of each pair what the difference is and whether the rows show it.

    Returns the pipeline's summary with `comparisons` (pair, slice, both scores, difference, interval, p) and `skipped`
    (what could not be run, and why).
    """
    with Stages(config) as run:
        files = run(
            "import data",
            import_files,
            files_by_split(train=config.train, validation=config.validation, test=config.test),
        )
        pinned = config.revision.get
        teacher_base = run("import teacher base", import_model, config.teacher_base, pinned(config.teacher_base))
        student_base = run("import student base", import_model, config.student_base, pinned(config.student_base))
        text = run("import text", import_files, {"text": config.text}) if config.text else None

        dataset = run("ingest", ingest, config.ingest, files, student_base)
        teacher = run("teacher", fine_tune, config.teacher, teacher_base, dataset)
        clip = MergeConfig(remedy="clip", clip_percentile=config.clip_percentile, max_mean_kl=1e9, min_top1=0)
        clipped = run("clip teacher", merge, clip, teacher, dataset)
        models: dict[str, AnyModel] = {"student-base": student_base, "teacher": teacher, CLIPPED: clipped}
        models["SFT"] = run("SFT", fine_tune, without_teacher(config.student), student_base, dataset)
        models["KD"] = _distilled(run, "KD", config, student_base, teacher, dataset)
        skipped = missing_for_nf4()
        if not skipped:
            models["SFT NF4"] = run("SFT NF4", fine_tune, config.nf4, student_base, dataset)
        models["KD clipped"] = _distilled(run, "KD clipped", config, student_base, clipped, dataset)

        scores = {
            name: run(f"evaluate {name}", evaluate, config.evaluate, model, dataset, name, None, text)
            for name, model in models.items()
        }
        in_nf4 = EvaluateConfig.model_validate(config.evaluate.model_dump() | {"load_in": "nf4"})
        for name in () if skipped else ARMS[:3]:
            label = name + AS_NF4
            scores[label] = run(f"evaluate {label}", evaluate, in_nf4, models[name], dataset, label, None, text)
        comparisons = compare_pairs(run, scores, config.out_of_scope_intent)
        create_table_artifact(
            table(comparisons), key="ablation", description="What each step changes, on the same rows"
        )
        with_charts = {
            name: ref for name, ref in {"ingest": dataset, **models}.items() if name in ("ingest", "teacher", *ARMS)
        }
        kinds = {name: KINDS.get(name, "student") for name in scores}
        return publish(run, dataset, scores, with_charts, None, kinds, {"comparisons": comparisons, "skipped": skipped})


def _distilled(
    run: Stages, name: str, config: AblationConfig, student: AnyModel, teacher: AnyModel, dataset: DatasetRef
) -> AnyModel:
    settings = config.student
    cache = None
    if not settings.teacher_online:
        cache = run(f"teacher-cache for {name}", cache_teacher, settings.teacher_cache, teacher, dataset)
    return run(name, distil, settings, student, teacher, dataset, cache)


def missing_for_nf4() -> dict[str, str]:
    """Why NF4 cannot be tried here, by what it would have been; empty where it can."""
    if find_spec("bitsandbytes") is None:
        return {"SFT NF4": "bitsandbytes is not installed: pip install bitsandbytes"}
    return {}


def compare_pairs(run: Stages, scores: dict[str, ReportRef], out_of_scope: str) -> list[dict[str, Any]]:
    """Every pair of `PAIRS` that was evaluated, on all rows and in and out of scope."""

    def predictions(ref: ReportRef) -> list[Prediction]:
        return read_predictions(fetch_input(run.settings, ref.digest) / "predictions.jsonl")

    comparisons = []
    for about, (a, b) in PAIRS.items():
        if a not in scores or b not in scores:
            continue
        check = primary_metric(scores[a].facts)
        for paired in compare_slices(predictions(scores[a]), predictions(scores[b]), check, out_of_scope):
            if paired.slice in SLICES:
                comparisons.append({"about": about, "from": a, "to": b, **paired._asdict()})
    return comparisons


def table(comparisons: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The comparisons as a person reads them: percent and points."""
    return [
        {
            "question": pair["about"], "from": pair["from"], "to": pair["to"],
            "rows": f"{pair['slice']} ({pair['rows']})",
            pair["check"].replace("_", " "): f"{pair['a']:.1%} -> {pair['b']:.1%}",
            "difference": f"{100 * pair['difference']:+.1f}",
            "95 % interval": f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}",
            "better/worse": f"{pair['better']}/{pair['worse']}", "p": f"{pair['p']:.2g}",
        }
        for pair in comparisons
    ]  # fmt: skip


def show(summary: dict[str, Any]) -> None:
    """The models and the pairs in the terminal."""
    show_models(summary)
    rows = table(summary["comparisons"])
    printed = Table(title="What each step changes")
    for column in rows[0] if rows else ():
        printed.add_column(column)
    for row in rows:
        printed.add_row(*(Text(visible(cell)) for cell in row.values()))
    Console(width=max(Console().width, 130)).print(printed)
    for name, reason in summary["skipped"].items():
        print(f"Skipped:  {name}: {visible(reason)}")


if __name__ == "__main__":
    start(ablation, AblationConfig, show)
