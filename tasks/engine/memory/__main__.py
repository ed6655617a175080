"""Prints the predicted device memory of a training run.

python -m tasks.engine.memory                                        # reported setups, with the predictions
python -m tasks.engine.memory config.json --base DIR [--tokens 4096] # a fine-tuning config on a model
"""

import argparse
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import Gemma3nConfig, Gemma3TextConfig, PretrainedConfig

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.memory.model_sizes import count_sizes
from tasks.engine.memory.predict import predict
from tasks.engine.memory.workload import workload_of
from tasks.engine.models.model_config import read_config
from tasks.engine.models.trainable import Method

Size = Literal["270M", "1B", "4B", "12B", "E2B", "E4B"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GEMMA3: dict[str, dict[str, Any]] = {
    "270M": dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
                 num_key_value_heads=1, sliding_window=512, vocab_size=262144),
    "1B": dict(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
               num_key_value_heads=1, sliding_window=512, vocab_size=262144),
    "4B": dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
               num_key_value_heads=4, sliding_window=1024, vocab_size=262208),
    "12B": dict(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
                num_key_value_heads=8, sliding_window=1024, vocab_size=262208),
}  # fmt: skip
GEMMA3N: dict[str, dict[str, Any]] = {
    "E2B": dict(num_hidden_layers=30, intermediate_size=8192, num_kv_shared_layers=10),
    "E4B": dict(num_hidden_layers=35, intermediate_size=16384, num_kv_shared_layers=15),
}


class Setup(NamedTuple):
    """A training setup with the GB of the card that its users reported."""

    title: str
    size: Size
    settings: dict[str, Any]
    rows: int
    reported: str


TRINITY = dict(rank=64, alpha=32, use_rslora=True, use_dora=True, target_modules=ALL, optimizer="adamw_8bit",
               gradient_checkpointing=True)  # fmt: skip
SMALL = dict(rank=16, target_modules=ALL, max_length=2048, gradient_checkpointing=True)
REPORTED = [
    Setup("12B, QLoRA r=64, rsLoRA, DoRA, 4096 tokens", "12B", {**TRINITY, "max_length": 4096}, 1, "15.6 of a T4's 16"),
    Setup("the same, 2048 tokens", "12B", {**TRINITY, "max_length": 2048}, 1, "3 less"),
    Setup("and rank 32", "12B", {**TRINITY, "max_length": 2048, "rank": 32}, 1, "2 less"),
    Setup("and no DoRA", "12B", {**TRINITY, "max_length": 2048, "rank": 32, "use_dora": False}, 1, "1.5 less"),
    Setup("and q_proj, v_proj alone", "12B", {**TRINITY, "max_length": 2048, "rank": 32, "use_dora": False,
                                               "target_modules": ["q_proj", "v_proj"]}, 1, "2 less"),
    Setup("Gemma 3n E2B, QLoRA, 2 x 2048", "E2B", {**SMALL, "optimizer": "adamw_8bit"}, 2, "~8 of 24"),
    Setup("Gemma 3n E4B, QLoRA, 1 x 2048", "E4B", {**SMALL, "optimizer": "paged_adamw_8bit"}, 1, "~18 of 24"),
    Setup("Gemma 3n E4B, QLoRA, 2 x 2048", "E4B", {**SMALL, "optimizer": "adamw_8bit"}, 2, "~22 of 24"),
]  # fmt: skip


def shape(size: str) -> PretrainedConfig:
    """The published shape of a Gemma 3 or Gemma 3n. Gemma 3's vision tower is left out."""
    if size in GEMMA3:
        return Gemma3TextConfig(**GEMMA3[size], head_dim=256, max_position_embeddings=32768)
    layers = GEMMA3N[size]["num_hidden_layers"]
    kinds = ["full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(layers)]
    sparse = [0.95] * 10 + [0.0] * (layers - 10)
    text = {**GEMMA3N[size], "layer_types": kinds, "activation_sparsity_pattern": sparse}
    return Gemma3nConfig(text_config=text, architectures=["Gemma3nForConditionalGeneration"])


def published() -> list[dict[str, str]]:
    """Each reported setup with its figure and the prediction, part by part, in GiB."""
    rows = []
    for setup in REPORTED:
        config = TrainingConfig(**setup.settings, precision="bfloat16", compile="off")
        parts = predict(
            count_sizes(shape(setup.size), config, "qlora"),
            workload_of(config, "qlora", setup.rows * config.max_length),
        )
        predicted = {name: f"{value:.2f}" for name, value in parts.table().items()}
        rows.append({"setup": setup.title, "reported (GB)": setup.reported, **predicted})
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Rows as Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in names) + " |" for row in rows)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--base", type=ModelDir.parse)
    parser.add_argument("--tokens", type=int, help="of a micro-batch; default: micro_batch_size x max_length")
    arguments = parser.parse_args()
    if arguments.config is None:
        print(table(published()))
        return
    settings = json.loads(arguments.config.read_text())
    method: Method = settings.pop("method", "lora")
    settings = {name: value for name, value in settings.items() if name in TrainingConfig.model_fields}
    config = TrainingConfig(**{"precision": "bfloat16", **settings})
    tokens = arguments.tokens or config.micro_batch_size * config.max_length
    parts = predict(count_sizes(read_config(arguments.base.base), config, method), workload_of(config, method, tokens))
    print(table([{name: f"{value:.2f}" for name, value in parts.table().items()}]))


if __name__ == "__main__":
    main()
