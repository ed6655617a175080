"""Fine-tunes a base model on a dataset's rows, with cross-entropy on the answers.

python -m tasks.teacher.run config.json --base DIR --dataset DIR --out DIR
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.batches import Batch
from tasks.engine.head import head_of, hidden_states
from tasks.engine.load import load_tokenizer, pick_device
from tasks.engine.losses import cross_entropy
from tasks.engine.outcome import fingerprint, finish, read_splits
from tasks.engine.plan import Plan
from tasks.engine.trainable import trainable_model
from tasks.engine.trainer import train
from tasks.teacher import FineTuneConfig


def fine_tune(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """Writes an adapter of `base` (lora, qlora) or a whole model (full) into `out`, and how the loss went."""
    report = Report()
    tokenizer = load_tokenizer(base, config.chat_template)
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)

    def objective(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        hidden = hidden_states(model, batch["input_ids"], batch["positions"])
        return {"loss": cross_entropy(hidden, head_of(model), batch["labels"], config.loss_chunk_mib << 20)}

    plan = Plan(
        build=lambda: trainable_model(config, config.method, base, pick_device()),
        examples=rows,
        validation=validation,
        objective=objective,
        config=config,
        job=job,
        made_by=fingerprint(config, dataset, base),
    )
    model, history = train(plan)
    return finish(plan, model, history, config.method, base, out, report, title="Fine-tuning the teacher")


if __name__ == "__main__":
    command(fine_tune)
