"""Distils the teacher into the student: the teacher's whole distribution on the answers, mixed with the labels."""

from typing import Literal

from pydantic import Field

from tasks.core.training import TrainingConfig


class DistillConfig(TrainingConfig):
    """Settings of `distil`: the loss is kd_weight * T^2 * divergence + ce_weight * cross-entropy."""

    method: Literal["full", "lora"] = "full"
    """Train all of the student's weights, or adapters."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate: about 5e-5 for all weights, 2e-4 for adapters."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher), or the generalized Jensen-Shannon divergence."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share in the mixture of `jsd` (arXiv 2306.13649)."""
    temperature: float = Field(2, gt=0, le=100)
    """Softens both distributions; the divergence and its gradient are multiplied by T^2 to keep their size."""
    kd_weight: float = Field(0.7, ge=0)
    """Weight of the divergence from the teacher."""
    ce_weight: float = Field(0.3, ge=0)
    """Weight of the cross-entropy with the labels."""
