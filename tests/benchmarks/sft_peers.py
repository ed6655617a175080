"""The peers' LoRA and QLoRA loops for tests/benchmarks/sft.py: TRL, TRL + Liger, Unsloth, on our rows in our order."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.turns import end_turn, wait_for_turn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_peer(
    work: Path, name: str, who: str, base: Path, dataset: Path, batch: int, method: str, recompute: bool, steps: int,
    warm_up: int, awake: int, write: Callable[[Path, str, dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Step times, losses and peak memory of `steps` steps of `who`."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true", UNSLOTH_DISABLE_STATISTICS="1")
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(work / f"compiled_{name.replace(' ', '_')}")
    began = time.perf_counter()
    if who == "unsloth":
        import unsloth  # noqa: F401  # before the rest: it changes them

    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tasks.core.refs import ModelDir
    from tasks.engine.data.dataset import encode_file
    from tasks.engine.data.sampler import row_order
    from tasks.engine.data.tokenizers import load_tokenizer

    cuda, curve = torch.cuda.is_available(), name.startswith("curve")
    examples = encode_file(load_tokenizer(ModelDir(base)), dataset / "train.jsonl", 1024, print)
    order = row_order([len(example.input_ids) for example in examples], batch, steps, seed=0)
    data = Dataset.from_dict({
        "input_ids": [examples[row].input_ids for row in order],
        "labels": [examples[row].labels for row in order],
    })  # fmt: skip
    model, tokenizer = load(who, base, method == "qlora", recompute)
    ticks: list[float] = []
    losses: list[float] = []

    def found() -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        timed = [b - a for a, b in zip(ticks[warm_up + awake :], ticks[warm_up + awake + 1 :], strict=False)]
        return {"seconds": timed, "losses": losses, "peak_gib": peak, "start": ticks[0] - began}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            if state.global_step == warm_up:
                wait_for_turn(work, name)
            ticks.append(time.perf_counter())
            if state.global_step == steps:
                write(work, name, found())
                end_turn(work, name)

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def filled(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([value + [fill] * (longest - len(value)) for value in values])

        return {
            "input_ids": filled([row["input_ids"] for row in rows], 0),
            "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": filled([row["labels"] for row in rows], -100),
        }

    settings = SFTConfig(
        output_dir=str(work / f"peer {name}"), per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        max_steps=steps, learning_rate=2e-3 if curve else 2e-4, bf16=cuda, use_cpu=not cuda,
        logging_steps=1 if curve else 5, save_strategy="no", report_to=[],
        optim="adamw_8bit" if cuda and not curve else "adamw_torch_fused",
        max_length=1024, gradient_checkpointing=recompute, use_liger_kernel=who == "liger", lr_scheduler_type="linear",
        warmup_steps=0, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = (InOrder if who != "unsloth" else SFTTrainer)(
        model=model, train_dataset=data, processing_class=tokenizer, data_collator=padded, callbacks=[Clock()],
        args=settings,
    )  # fmt: skip
    trainer.train()
    return found()


def load(who: str, base: Path, four_bit: bool, recompute: bool) -> tuple[Any, Any]:
    """The peer's adapted model and its tokenizer."""
    import torch

    if who == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            str(base), max_seq_length=1024, dtype=torch.bfloat16, load_in_4bit=four_bit, local_files_only=True
        )
        model = FastLanguageModel.get_peft_model(
            model, r=32, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
            use_gradient_checkpointing="unsloth" if recompute else False, random_state=0,
        )  # fmt: skip
        return model, tokenizer
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16 if cuda else torch.float32, device_map={"": 0 if cuda else "cpu"},
        quantization_config=quantization if four_bit else None, attn_implementation="sdpa",
    )  # fmt: skip
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    torch.manual_seed(0)
    lora = LoraConfig(r=32, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora), AutoTokenizer.from_pretrained(base)
