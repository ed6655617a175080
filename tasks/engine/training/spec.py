"""What a training run is made of: rows, loss, settings; and the loss of a model under them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.memory_fallback import micro_batch, settings_at
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, row_order, to_device
from tasks.engine.data.micro_batches import Feed, every_row, is_packed
from tasks.engine.distributed import ranks
from tasks.engine.models.load import pick_dtype
from tasks.engine.speed.compile import compiling_pays, run_layers
from tasks.engine.speed.cuda_graphs import Graphs, most_labels
from tasks.engine.speed.fused_lora.fused_layers import fuse_adapters
from tasks.engine.speed.offload import host_has, kept_a_token
from tasks.engine.speed.packing_support import make_packable
from tasks.engine.training.history import History
from tasks.engine.training.weight_swap import Shown

# Sums over a batch's labels: "loss" with its gradient, and further parts by name ("kd_loss", "ce_loss").
Objective = Callable[[PreTrainedModel, Batch], dict[str, Tensor]]
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


@dataclass
class Plan:
    """Everything that decides a run.

    `build` makes the untrained model (again, after a divergence); `validation` are rows after the training rows, in
    the numbering that `objective` sees; `made_by` is a fingerprint of config, rows and models, so that no other
    run's checkpoint is continued. `rung` says how many out-of-memory rungs `config` has still to go down; `strategy`
    what several processes split. `fp8` multiplies the adapted MLPs' frozen weights in 8 bits. `shown` makes the weights
    that the loss sees, where they are not the trained ones.
    `enrich` adds to a batch, on the host, what the objective needs beside it; `before_step` is called with the history
    and the number of finished steps before each step. Checkpoints are in `folder` of the job's work directory. On CUDA
    `window` steps deal their rows anew among themselves, so that all are of one size
    (tasks.engine.data.sequence_packing.evened).
    """

    build: Callable[[], PreTrainedModel]
    examples: Sequence[Example]
    validation: Sequence[Example]
    objective: Objective
    config: TrainingConfig
    job: Job
    made_by: str
    shown: Callable[[PreTrainedModel], Shown] | None = None
    rung: int | None = None
    strategy: ranks.Strategy = "ddp"
    enrich: Callable[[Batch], Batch] | None = None
    before_step: Callable[[History, int], None] | None = None
    folder: str = "checkpoints"
    fp8: bool = False
    window: int = 1

    def __post_init__(self) -> None:
        """Goes down the job's rungs, unless whoever made the plan did: those that leave rows and model as they are."""
        same_model = self.config.model_copy(update={"allow_quality_loss": False})
        self.config = settings_at(same_model, self.job.rung if self.rung is None else self.rung)
        if self.config.batch_size % ranks.count():
            raise BadConfig(
                f"batch_size={self.config.batch_size} cannot be split over {ranks.count()} processes: "
                f"set a multiple of {ranks.count()}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        asked = math.ceil(len(self.examples) * self.config.epochs / self.config.batch_size)
        return self.config.max_steps or max(1, asked)

    @property
    def is_split(self) -> bool:
        """Whether each process holds a part of the layers' weights."""
        return self.strategy == "fsdp2" and ranks.count() > 1

    @property
    def own_batch(self) -> int:
        """Rows of a step that this process works on."""
        return self.config.batch_size // ranks.count()

    @property
    def micro_batch(self) -> int:
        """Rows in memory at once."""
        return micro_batch(self.own_batch, self.config.micro_batch_size)

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints are."""
        return self.job.work / self.folder


def validation_losses(plan: Plan, model: PreTrainedModel) -> dict[str, float]:
    """Mean losses per label token over the validation rows; empty when there are none or a stop was asked for."""
    sums: dict[str, Tensor] = {}
    labels, done, told = 0, 0, 0
    training = model.training
    model.train(False)
    alone = ranks.count() == 1  # several go through all rows in step: each needs the others' parts of the layers
    for batch in every_row(plan.validation, len(plan.examples), plan.micro_batch, is_packed(model)):
        if alone and plan.job.stop_requested:
            break
        with torch.no_grad():
            parts = loss_sums(plan, model, to_device(batch, model.device))
        sums = {name: sums[name] + value if sums else value for name, value in parts.items()}
        labels, done = labels + len(batch["labels"]), done + len(batch["rows"])
        if done - told > 16 * plan.micro_batch or done == len(plan.validation):
            plan.job.progress(done, len(plan.validation), "validation rows")
            told = done
    model.train(training)
    return {name: float(value) / labels for name, value in sums.items()} if done == len(plan.validation) else {}


def feed(plan: Plan, model: PreTrainedModel) -> Feed:
    """The micro-batches of this process's rows; packed where the model can be, which gives it packed attention."""
    config, device, packed = plan.config, model.device, False
    if config.packing == "auto":
        reason = make_packable(model, pick_dtype(config.precision, device.type))
        packed = reason is None
        if reason:
            plan.job.log(f"{reason}. Rows are padded instead", "warning")
    lengths = [len(example.input_ids) for example in plan.examples]
    order = ranks.share(row_order(lengths, config.batch_size, plan.steps, config.seed), config.batch_size)
    cuda = device.type == "cuda"
    return Feed(
        plan.examples, order, plan.own_batch, plan.micro_batch, packed, shapes=2 * cuda, multiple=128 if cuda else 1,
        window=plan.window if cuda else 1,
    )  # fmt: skip


def quicken(plan: Plan, model: PreTrainedModel, batches: Feed) -> None:
    """Fuses the adapters' products, and has the decoder's layers recomputed and compiled as the config says."""
    config = plan.config
    if plan.is_split and plan.fp8:
        raise BadConfig("fp8 needs whole weights: set strategy=ddp, or fp8=false")
    dtype = pick_dtype(config.precision, model.device.type)
    half = dtype if dtype == torch.bfloat16 else None
    fused = fuse_adapters(model, not config.gradient_checkpointing, plan.fp8, plan.is_split, half)
    small = sum(group.fp8 for group in fused) // 2
    if plan.fp8 and not small:
        raise BadConfig(
            "fp8 fits none of this model's MLPs: it takes dense weights whose widths are multiples of 128, with plain "
            "adapters on gate, up and down. Set fp8=false"
        )
    pays = compiling_pays(model, len(batches), batches.tokens / max(1, len(batches)), config.gradient_checkpointing)
    compiled = config.compile == "on" or (config.compile == "auto" and pays)
    away = compiled and config.gradient_checkpointing and model.device.type == "cuda" and not plan.is_split
    away = away and _host_has_room(model, batches)
    run_layers(
        model, config.gradient_checkpointing, compiled, random=config.dropout > 0, away=away,
        warn=lambda text: plan.job.log(text, "warning"),
    )  # fmt: skip
    if model.device.type == "cuda":
        told = [f"{len(fused)} groups of adapters fused"] * bool(fused) + ["layers compiled"] * compiled
        told += [f"{small} MLPs in 8 bits"] * bool(small) + ["activations kept in host memory"] * away
        plan.job.log(", ".join([*told, "rows packed" if batches.packing else "rows padded"]))


def _host_has_room(model: PreTrainedModel, batches: Feed) -> bool:
    """Whether the host can hold what all layers keep of the largest micro-batch, for every process on it."""
    tokens = max(batches.packing.lengths, default=0) if batches.packing else 0
    return host_has(float(tokens) * kept_a_token(model) * ranks.count()) and tokens > 0


def graphs_for(plan: Plan, batches: Feed, model: PreTrainedModel) -> Graphs | None:
    """Graphs of the run's micro-batches where they can be captured: CUDA, bfloat16, packed to static lengths, nothing
    random in the forward, trained weights in their places."""
    config, device = plan.config, model.device.type
    fits = device == "cuda" and pick_dtype(config.precision, device) == torch.bfloat16 and config.dropout == 0
    if not (fits and plan.shown is None and batches.packing and batches.packing.lengths):
        return None
    if config.cuda_graphs == "off" or config.optimizer != "adamw":
        return None
    stack = not (config.gradient_checkpointing or plan.is_split)
    return Graphs(
        model, lambda model, batch: loss_sums(plan, model, batch), most_labels(batches), stack,
        lambda text: plan.job.log(text, "warning"),
    )  # fmt: skip


def loss_sums(plan: Plan, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """The objective with matrices multiplied in the config's precision; parameters keep theirs."""
    device = batch["input_ids"].device.type
    dtype = pick_dtype(plan.config.precision, device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return plan.objective(model, batch)


def training_arguments(plan: Plan, scale: float, device: str) -> TrainingArguments:
    """transformers' settings for a plan, with `scale` of its learning rate. Saving and telling are Reporter's."""
    config = plan.config
    arguments = TrainingArguments(
        output_dir=str(plan.checkpoints),
        per_device_train_batch_size=1,  # a micro-batch of `feed`
        gradient_accumulation_steps=plan.own_batch // plan.micro_batch,
        max_steps=plan.steps,
        learning_rate=config.learning_rate * scale,
        lr_scheduler_type="constant_with_warmup" if config.scheduler == "constant" else config.scheduler,
        warmup_steps=math.ceil(config.warmup_ratio * plan.steps),
        optim=OPTIMIZERS[config.optimizer],
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=device == "cpu",
        logging_strategy="no",  # Reporter tells, by time
        logging_nan_inf_filter=False,
        save_strategy="no",  # Reporter asks for checkpoints
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        accelerator_config={"non_blocking": device == "cuda"},  # or each batch's copy waits for the step before
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several cards are torchrun's business, not DataParallel's
    return arguments
