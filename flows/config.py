"""The pipeline's single parameter: data, base models, and one config a stage."""

from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from flows.checks import require_metric, require_revisions_of_models, require_separate_rows
from flows.flow_config import FlowConfig
from tasks.distill import DistillConfig
from tasks.evaluate import EvaluateConfig
from tasks.gate import GateConfig
from tasks.gguf import GgufConfig, Kind
from tasks.ingest import IngestConfig
from tasks.merge import MergeConfig
from tasks.outliers import OutlierConfig
from tasks.teacher import FineTuneConfig

DELIVERED: list[Kind] = ["BF16", "Q8_0", "Q4_0", "Q4_K_M"]


def files_by_split(**files: str | None) -> dict[str, str]:
    """Files by split, those that are given."""
    return {split: path for split, path in files.items() if path}


def _require_distinct_kinds(files: list[GgufConfig]) -> list[GgufConfig]:
    kinds = [conversion.kind for conversion in files]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"gguf names a kind twice: {', '.join(kinds)}")
    return files


GgufFiles = Annotated[list[GgufConfig], Field(min_length=1), AfterValidator(_require_distinct_kinds)]
"""GGUF files to deliver: one of a kind, for they are named by it."""


def without_teacher(student: DistillConfig) -> FineTuneConfig:
    """A student's training settings without those of distillation."""
    return FineTuneConfig.model_validate(student.model_dump(include=set(FineTuneConfig.model_fields)))


class PipelineConfig(FlowConfig):
    """JSONL in, proven GGUF out. Every field is in docs/configuration.md, presets are in `deployments/presets/`."""

    model_config = ConfigDict(title="Pipeline")

    train: str
    """Training rows: a file, a directory, a glob, `s3://bucket/key` or `hub:owner/name`; paths are relative to the
    working directory."""
    validation: str | None = None
    """Rows for the validation loss; without it a part of `train` is held back."""
    test: str | None = None
    """Held-out rows that every model is evaluated on; without it a part of `train` is held back."""
    teacher_base: str
    """The teacher's base: a name on the Hugging Face hub (`google/gemma-3-1b-it`) or a local directory."""
    student_base: str
    """The student's base, with the teacher's tokenizer (`google/gemma-3-270m-it`)."""
    gguf: GgufFiles = [GgufConfig(kind=kind) for kind in DELIVERED]
    """The GGUF files to deliver: kinds (`Q4_K_M`), or a kind with settings of its own."""
    text: str | None = None
    """General text that no model was trained on (a .txt file): its perplexity shows what a model forgot."""
    vocabulary_text: str | None = None
    """Text (a .txt file) whose most frequent pieces stay, beside the rows' own, when the student's `vocabulary` is
    made smaller."""
    revision: dict[str, str] = {}
    """Hub revisions to pin, by name: `{"google/gemma-3-1b-it": "<commit>"}`."""
    direct: bool = True
    """Also fine-tune the student without a teacher, on the same rows for the same steps: what does distilling buy?"""
    ingest: IngestConfig = IngestConfig()
    teacher: FineTuneConfig = FineTuneConfig()
    """How the teacher is fine-tuned on the rows."""
    student: DistillConfig = DistillConfig()
    """How the student is trained: taught by the teacher, and for comparison (`direct`) without it. Its loss is
    kd_weight * T^2 * divergence + ce_weight * cross-entropy."""
    outliers: OutlierConfig = OutlierConfig()
    merge: MergeConfig = MergeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        require_revisions_of_models(self.revision, (self.teacher_base, self.student_base))
        require_separate_rows(self.train, validation=self.validation, test=self.test)
        require_metric(self.gate, self.evaluate)
        return self

    @model_validator(mode="after")
    def _files_lie_on_the_grid(self) -> Self:
        for conversion in self.gguf:
            plain = not conversion.imatrix and not conversion.overrides and conversion.sensitive == "recommend"
            on_grid = plain and conversion.embedding_type == self.student.grid_embedding
            if conversion.kind == self.student.grid and not on_grid:
                raise ValueError(
                    f"the student is trained on the grid of {conversion.kind}: give that GGUF imatrix: false, "
                    f"no overrides, sensitive: recommend and embedding_type: {self.student.grid_embedding}, "
                    "or its weights are rounded once more"
                )
        return self

    @property
    def files(self) -> dict[str, str]:
        """The user's files by split, those that are given."""
        return files_by_split(train=self.train, validation=self.validation, test=self.test)

    @property
    def direct_config(self) -> FineTuneConfig:
        """The student's training settings without those of distillation."""
        return without_teacher(self.student)
