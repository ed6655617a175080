"""Distils the teacher into the student: a divergence from the teacher's distribution, mixed with cross-entropy."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.core.config import MoreThan, OnlyWith
from tasks.core.training_config import TrainingConfig
from tasks.distill.divergence_config import DISTILLED, DivergenceConfig
from tasks.distill.teacher_cache import TeacherCacheConfig, TeacherPrecision

LABELLED = OnlyWith("ce_weight", MoreThan(0))


class DistillConfig(DivergenceConfig, TrainingConfig):
    """Settings of `distil`: the loss is kd_weight * T^2 * divergence + ce_weight * cross-entropy."""

    method: Literal["full", "lora"] = "full"
    """Train all of the student's weights, or adapters."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate: about 5e-5 for all weights, 2e-4 for adapters."""
    temperature: Annotated[float, DISTILLED] = Field(2, gt=0, le=100)
    """Softens both distributions; the divergence and its gradient are multiplied by T^2 to keep their size."""
    kd_weight: float = Field(0.7, ge=0)
    """Weight of the divergence from the teacher."""
    ce_weight: float = Field(0.3, ge=0)
    """Weight of the cross-entropy with the labels."""
    balance: Annotated[bool, DISTILLED, LABELLED] = False
    """Change both weights, their sum kept, so that weight times gradient norm (`kd_grad_norm`, `ce_grad_norm`, means of
    the last 20 steps) of divergence and cross-entropy stand in the ratio kd_weight : ce_weight."""
    teacher_online: bool = False
    """Run the teacher at every step, in memory beside the student, instead of once with its hidden states on disk."""
    teacher_precision: TeacherPrecision = "auto"
    """The teacher's dtype; `8bit` and `4bit` quantize its weights (bitsandbytes, CUDA only)."""
    clip_norms: float | None = Field(None, gt=0, lt=1)
    """Clip the teacher's norm weights at this quantile of their absolute values first. An ablation: it harms."""
    states_budget_gib: Annotated[float, OnlyWith("teacher_online", (False,))] = Field(64, ge=0)
    """Above this many GiB of hidden states, only the `top_k` largest logits and the mass of the others are cached."""
    top_k: Annotated[int, OnlyWith("teacher_online", (False,))] = Field(64, ge=1, le=4096)
    """How many logits of a position are cached above the budget."""
    wrong_row_weight: float = Field(1, ge=0, le=1)
    """Weight of training rows that the teacher gets wrong (see report/teacher.html); 0 leaves them out."""
    min_teacher_accuracy: float = Field(0, ge=0, le=1)
    """The run stops when the teacher gets a smaller share of the validation rows right (greedily, token for token)."""
    max_teacher_loss: float | None = Field(None, gt=0)
    """The run stops when the teacher's cross-entropy a token on the validation rows is higher."""
    on_policy_rounds: int = Field(0, ge=0, le=20)
    """Rounds after the run in which the student answers prompts itself and learns the teacher's distribution on its own
    answers (GKD)."""
    on_policy_share: Annotated[float, OnlyWith("on_policy_rounds", MoreThan(0))] = Field(0.25, gt=0, le=1)
    """Share of the training rows whose prompts a round answers and trains on once."""
    grid: Literal["none", "Q8_0", "Q4_0"] = "none"
    """Quantization-aware: train the last steps on weights rounded as a GGUF file of this kind stores them; method full
    only. The student is saved in float32, and its file of this kind has the very same weights."""
    grid_fraction: Annotated[float, OnlyWith("grid", ("Q8_0", "Q4_0"))] = Field(0.5, gt=0, le=1)
    """Those last steps, as a share of all."""
    grid_embedding: Annotated[Literal["Q8_0", "Q4_0"], OnlyWith("grid", ("Q8_0", "Q4_0"))] = "Q8_0"
    """The tied embedding's format in the file. llama.cpp gives a Q4_0 file a Q8_0 embedding unless told otherwise
    (Q6_K where the hidden size is a multiple of 256: tell it there)."""
    vocabulary: int | None = Field(None, ge=300)
    """Reduce the tokenizer, embedding and head to this many pieces; method full only. None keeps all."""
    processes: int = Field(1, ge=1, le=16)
    """GPUs of this host that train together, one process each; `batch_size` is split over them."""

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.kd_weight + self.ce_weight == 0:
            raise ValueError("kd_weight and ce_weight are both 0, so nothing is learnt: set one of them")
        return self

    @model_validator(mode="after")
    def _require_compatible_methods(self) -> Self:
        for name, value, off in (("grid", self.grid, "none"), ("vocabulary", self.vocabulary, None)):
            if value != off and self.method != "full":
                raise ValueError(
                    f"{name}={value} needs method=full: merging an adapter would leave the grid, and an adapter has no "
                    f"embedding to trim. Set method=full, or {name}={off}"
                )
        if self.on_policy_rounds and (self.grid != "none" or self.vocabulary is not None):
            raise ValueError("on_policy_rounds come after the run: set grid=none and vocabulary=null, or no rounds")
        if self.on_policy_rounds and self.processes > 1:
            raise ValueError(f"processes={self.processes}: on_policy_rounds answer on one GPU; set processes=1")
        return self

    @property
    def teacher_cache(self) -> TeacherCacheConfig:
        """The settings that decide the teacher's cache."""
        return TeacherCacheConfig.model_validate(self.model_dump(include=set(TeacherCacheConfig.model_fields)))
