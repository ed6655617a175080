"""Rounds in which the student learns from its own answers: it writes some, the teacher says how it would have gone on.

The idea is GKD's (arXiv 2306.13649): what the student will meet when it is used are its own beginnings of answers, not
the dataset's. Own answers are no labels, so the divergence alone counts.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.teacher_targets import Lessons
from tasks.distill.teachers import Remembered, remembered
from tasks.engine.data.chat_template import IGNORE, Example, end_of_turn_id
from tasks.engine.losses.loss_mix import LossMix
from tasks.engine.models.lm_head import unwrap
from tasks.engine.models.load import apply_score_softcap
from tasks.engine.training.loop import train
from tasks.engine.training.spec import Objective, TrainingSpec, validation_losses

TOGETHER = 64  # rows answered at once


@dataclass
class OnPolicy:
    """What rounds need beside the plan of the run before them; `objective` makes the loss of lessons and a mix."""

    config: DistillConfig
    plan: TrainingSpec
    teacher: ModelDir
    tokenizer: PreTrainedTokenizerBase
    mix: LossMix
    objective: Callable[[Lessons, LossMix], Objective]

    def rounds(self, model: PreTrainedModel) -> tuple[PreTrainedModel, list[dict[str, float]]]:
        """The student after `on_policy_rounds` more rounds; each round's rows, and the divergence before and after it.

        A round taken up again finds its answers, states and checkpoint in the job's work directory.
        """
        told = []
        for number in range(1, self.config.on_policy_rounds + 1):
            rows = self._answers(model, number)
            states = remembered(
                self.config.states, self.teacher, rows, None, self.plan.job.work / f"states-{number}", self.plan.job
            )
            taught = Remembered(states, [*rows, *rows], self.config.temperature)  # to learn, and to measure on
            weight = self.mix.kd_weight + self.mix.ce_weight
            mix = replace(self.mix, kd_weight=weight, ce_weight=0)
            plan = self._plan(model, number, rows, taught, self.objective(Lessons(rows, taught), mix))
            before = validation_losses(plan, model)["kd_loss"]
            del model
            model, _ = train(plan)
            after = validation_losses(plan, model)["kd_loss"]
            told.append({"rows": len(rows), "kd_loss_before": before, "kd_loss_after": after})
            self.plan.job.log(f"round {number} on {len(rows)} own answers: divergence {before:.4g} -> {after:.4g}")
        return model, told

    def _plan(
        self, model: PreTrainedModel, number: int, rows: list[Example], taught: Remembered, objective: Objective
    ) -> TrainingSpec:
        kept = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}

        def build() -> PreTrainedModel:
            built = self.plan.build()
            with torch.no_grad():
                for name, parameter in built.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])
            return built

        made_by = hashlib.sha256(f"{self.plan.made_by} {number} {rows}".encode()).hexdigest()
        config = self.config.model_copy(update={"epochs": 1, "max_steps": None, "validate_every_steps": 0})
        return TrainingSpec(
            build=build, examples=rows, validation=rows, objective=objective, config=config, job=self.plan.job,
            made_by=made_by, enrich=taught.enrich, folder=f"checkpoints-{number}",
        )  # fmt: skip

    def _answers(self, model: PreTrainedModel, number: int) -> list[Example]:
        """This round's rows: prompts of some training rows with the student's own answers."""
        path = self.plan.job.work / f"answers-{number}.json"
        if not path.is_file():
            count = max(1, round(self.config.on_policy_share * len(self.plan.examples)))
            some = sorted(random.Random(self.config.seed + number).sample(range(len(self.plan.examples)), count))
            examples = [self.plan.examples[row] for row in some]
            torch.manual_seed(self.config.seed + number)
            own = answer(model, examples, self.tokenizer, lambda done: self._tell(done, count))
            _write(path, own)
        return [Example(*row) for row in json.loads(path.read_text())]

    def _tell(self, done: int, count: int) -> None:
        self.plan.job.progress(done, count, "answers of the student")


@torch.no_grad()
def answer(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase,
    tell: Callable[[int], None],
) -> list[Example]:  # fmt: skip
    """The examples' prompts, each with an answer sampled at temperature 1 and no longer than the longest label."""
    unwrap(model).set_attn_implementation("sdpa")  # packed attention has no cache
    apply_score_softcap(unwrap(model))
    model.train(False)
    end, found = end_of_turn_id(tokenizer), list[Example]()
    longest = max(len(example.answer_ids) for example in examples)
    for start in range(0, len(examples), TOGETHER):
        prompts = [_prompt(example) for example in examples[start : start + TOGETHER]]
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):  # on the left, so that all answers begin in one column
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        made = cast(Any, model).generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=longest,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        for prompt, row in zip(prompts, cast(Tensor, made)[:, width:].tolist(), strict=True):
            own = row[: row.index(end) + 1] if end in row else row
            found.append(Example(prompt + own, [IGNORE] * len(prompt) + own))
        tell(len(found))
    return found


def _prompt(example: Example) -> list[int]:
    """The ids before the first label."""
    return example.input_ids[: next(i for i, label in enumerate(example.labels) if label != IGNORE)]


def _write(path: Path, rows: list[Example]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows))
    temporary.replace(path)
