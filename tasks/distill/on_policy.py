"""On-policy rounds: the student samples answers, and learns the teacher's distribution at each of their tokens.

This is GKD's idea (arXiv 2306.13649): in use the student continues its own beginnings of answers, not the dataset's.
Its answers are no labels, so the loss is the divergence alone.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.teacher_targets import TeacherTargets
from tasks.distill.teachers import CachedTeacher, fill_cache
from tasks.engine.data.chat_template import IGNORE, Example, end_of_turn_id
from tasks.engine.losses.loss_mix import LossMix
from tasks.engine.models.lm_head import unwrap
from tasks.engine.models.load import apply_score_softcap
from tasks.engine.training.objective import Objective
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.train import train
from tasks.engine.training.validation import validation_losses

GENERATION_BATCH = 64  # prompts of a generation batch


@dataclass
class OnPolicy:
    """On-policy rounds after the run of `spec`; `objective` makes the loss of targets and a mix."""

    config: DistillConfig
    spec: TrainingSpec
    teacher: ModelDir
    tokenizer: PreTrainedTokenizerBase
    mix: LossMix
    objective: Callable[[TeacherTargets, LossMix], Objective]

    def rounds(self, model: PreTrainedModel) -> tuple[PreTrainedModel, list[dict[str, float]]]:
        """The student after `on_policy_rounds` rounds; each round's rows, and the divergence before and after it.

        A resumed round has its answers, teacher cache and checkpoint in the job's work directory.
        """
        results, job = [], self.spec.job
        for number in range(1, self.config.on_policy_rounds + 1):
            rows = self._answers(model, number)
            directory = job.work / f"teacher-cache-{number}"
            cache = fill_cache(self.config.teacher_cache, self.teacher, rows, None, directory, job)
            teacher = CachedTeacher(cache, [*rows, *rows], self.config.temperature)  # training and validation rows
            weight = self.mix.kd_weight + self.mix.ce_weight
            mix = replace(self.mix, kd_weight=weight, ce_weight=0)
            spec = self._round_spec(model, number, rows, teacher, self.objective(TeacherTargets(rows, teacher), mix))
            before = validation_losses(spec, model)["kd_loss"]
            del model
            model, _ = train(spec)
            after = validation_losses(spec, model)["kd_loss"]
            results.append({"rows": len(rows), "kd_loss_before": before, "kd_loss_after": after})
            job.log(f"on-policy round {number}, {len(rows)} answers: divergence {before:.4g} -> {after:.4g}")
        return model, results

    def _round_spec(
        self, model: PreTrainedModel, number: int, rows: list[Example], teacher: CachedTeacher, objective: Objective
    ) -> TrainingSpec:
        """Specification of a round's run, which starts from the weights of `model`."""
        trained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}

        def build() -> PreTrainedModel:
            student = self.spec.build()
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    if name in trained:
                        parameter.copy_(trained[name])
            return student

        fingerprint = hashlib.sha256(f"{self.spec.fingerprint} {number} {rows}".encode()).hexdigest()
        config = self.config.model_copy(update={"epochs": 1, "max_steps": None, "validate_every_steps": 0})
        return TrainingSpec(
            build=build, examples=rows, validation=rows, objective=objective, config=config, job=self.spec.job,
            fingerprint=fingerprint, prepare_batch=teacher.prepare_batch, checkpoint_dir=f"checkpoints-{number}",
        )  # fmt: skip

    def _answers(self, model: PreTrainedModel, number: int) -> list[Example]:
        """This round's rows: prompts of some training rows with the student's own answers."""
        path = self.spec.job.work / f"answers-{number}.json"
        if not path.is_file():
            count = max(1, round(self.config.on_policy_share * len(self.spec.examples)))
            sample = sorted(random.Random(self.config.seed + number).sample(range(len(self.spec.examples)), count))
            examples = [self.spec.examples[row] for row in sample]
            torch.manual_seed(self.config.seed + number)
            report = partial(self.spec.job.progress, total=count, unit="answers of the student")
            _write(path, sample_answers(model, examples, self.tokenizer, report))
        return [Example(*row) for row in json.loads(path.read_text())]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase,
    report: Callable[[int], None],
) -> list[Example]:  # fmt: skip
    """The examples' prompts, each with an answer sampled at temperature 1, no longer than the longest of the examples'.

    `report` is called with the number of answers so far.
    """
    unwrap(model).set_attn_implementation("sdpa")  # packed attention has no cache
    apply_score_softcap(unwrap(model))
    model.train(False)
    end, answers = end_of_turn_id(tokenizer), list[Example]()
    longest = max(len(example.answer_ids) for example in examples)
    for start in range(0, len(examples), GENERATION_BATCH):
        prompts = [_prompt(example) for example in examples[start : start + GENERATION_BATCH]]
        width = max(map(len, prompts))
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):  # padded on the left, so that all answers begin in one column
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
        generated = cast(Any, model).generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=longest,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
        for prompt, row in zip(prompts, cast(Tensor, generated)[:, width:].tolist(), strict=True):
            answer = row[: row.index(end) + 1] if end in row else row
            answers.append(Example(prompt + answer, [IGNORE] * len(prompt) + answer))
        report(len(answers))
    return answers


def _prompt(example: Example) -> list[int]:
    """The ids before the first label."""
    return example.input_ids[: next(i for i, label in enumerate(example.labels) if label != IGNORE)]


def _write(path: Path, rows: list[Example]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows))
    temporary.replace(path)
