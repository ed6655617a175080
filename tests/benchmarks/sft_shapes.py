"""Random checkpoints of real shapes with a stand-in tokenizer, and rows for them (tests/benchmarks/sft.py).

The tokenizer has one word a token, so that a row's length in tokens is chosen exactly.
"""

import json
import random
from pathlib import Path

SHAPES = {
    "pico": dict(vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=32, sliding_window=32, query_pre_attn_scalar=32),
    "1b": dict(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
               num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
               query_pre_attn_scalar=256),
    "4b": dict(vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
               num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024,
               query_pre_attn_scalar=256),
}  # fmt: skip
TEMPLATE = "{{ bos_token }} {% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
FRAME = 3  # a row's tokens beside its words: <bos>, and <eos> behind prompt and answer


def write_checkpoint(path: Path, shape: str) -> None:
    """A random Gemma3ForCausalLM in bfloat16, made on the GPU where there is one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = Gemma3TextConfig(**SHAPES[shape], max_position_embeddings=32768)
        Gemma3ForCausalLM(config).save_pretrained(path)
    torch.set_default_dtype(torch.float32)
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"t{i}" for i in range(4, SHAPES[shape]["vocab_size"]))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        chat_template=TEMPLATE,
    ).save_pretrained(path)  # fmt: skip


def write_rows(path: Path, lengths: list[tuple[int, int]], vocabulary: int, seed: int = 0) -> None:
    """`train.jsonl` with rows of so many prompt and answer words, the frequent ones as frequent as Zipf has them."""
    path.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(seed), range(4, vocabulary)
    weights = [1 / (rank + 10) for rank in range(len(words))]
    with (path / "train.jsonl").open("w") as file:
        for prompt, answer in lengths:
            drawn = [f"t{word}" for word in draw.choices(words, weights, k=prompt + answer)]
            user, assistant = " ".join(drawn[:prompt]), " ".join(drawn[prompt:])
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            file.write(json.dumps({"messages": messages}) + "\n")


def quickstart_lengths(count: int) -> list[tuple[int, int]]:
    """(prompt, answer) words so that rows are as long as the quickstart's training rows, in their order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("deployments/quickstart/teacher")
    found = []
    for line in Path("deployments/quickstart/data/train.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        user = [{"role": "user", "content": row["instruction"]}]
        prompt = len(tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False))
        answer = len(tokenizer(row["output"], add_special_tokens=False)["input_ids"])
        found.append((max(1, prompt - FRAME + 1), answer))
    return [found[i % len(found)] for i in range(count)]
