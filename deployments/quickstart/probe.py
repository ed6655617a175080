"""How well do the bases learn the quickstart? A short LoRA fine-tune and distillation, without the pipeline, then greedy scores.

    python -m deployments.quickstart.probe [folder with teacher/ and student/]

Prints exact match, valid JSON and out-of-scope recall on test.jsonl for the bases, the teacher, the student trained directly
and distilled, and for the student with its matrices rounded as Q8_0 and Q4_0 round them.
"""

import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
Rows = list[tuple[list[int], list[int], str]]


class Lora(nn.Module):
    """A frozen linear layer with a low-rank update (arXiv 2106.09685), scaled by 2."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2.0 * (x @ self.down.T) @ self.up.T

    def merged(self) -> nn.Linear:
        self.base.weight.data += 2.0 * self.up.data @ self.down.data
        return self.base


def adapt(model: nn.Module, rank: int) -> nn.Module:
    """Freeze the model and put a LoRA on every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Lora(child, rank))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fold every LoRA into its layer."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, Lora):
                    setattr(part, name, child.merged())
    return model


def load_rows(name: str, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """(prompt ids, answer ids with `<end_of_turn>`, answer text) of every row of a file."""
    rows = []
    for line in (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turn = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        answer = tokenizer(row["output"] + "<end_of_turn>", add_special_tokens=False).input_ids
        rows.append((list(prompt), list(answer), row["output"]))
    return rows


def batches(rows: Rows, steps: int, size: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded ids and labels (size, length) for `steps` steps, reshuffled every epoch."""
    generator, order, result = torch.Generator().manual_seed(0), [], []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(rows), generator=generator).tolist()
        taken, order = [rows[i] for i in order[:size]], order[size:]
        width = max(len(prompt) + len(answer) for prompt, answer, _ in taken)
        ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a, _ in taken])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a, _ in taken])
        result.append((ids.to(device), labels.to(device)))
    return result


def tune(
    model: nn.Module, rows: Rows, steps: int, rank: int, lr: float, teacher: nn.Module | None = None, size: int = 32
) -> nn.Module:
    """LoRA fine-tune; with a teacher the loss is 0.7 T^2 KL at T=2 + 0.3 CE. Returns the merged model."""
    device = next(model.parameters()).device.type
    model = adapt(copy.deepcopy(model), rank).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, start = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0), time.time()
    causal = {"full_attention": None, "sliding_attention": None}
    for step, (ids, labels) in enumerate(batches(rows, steps, size, device)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1.0 - step / steps)
        keep = labels[:, 1:] != -100
        logits = model(input_ids=ids, attention_mask=causal, use_cache=False).logits[:, :-1][keep].float()
        loss = F.cross_entropy(logits, labels[:, 1:][keep])
        if teacher is not None:
            with torch.no_grad():
                target = teacher(input_ids=ids, attention_mask=causal, use_cache=False).logits[:, :-1][keep].float()
            divergence = F.kl_div(
                F.log_softmax(logits / 2, -1), F.log_softmax(target / 2, -1), log_target=True, reduction="batchmean"
            )
            loss = 0.7 * 4 * divergence + 0.3 * loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    print(f"    {steps} steps in {time.time() - start:.0f} s, last loss {loss.item():.4f}", flush=True)
    return merge(model).eval()


@torch.no_grad()
def answers(model: nn.Module, rows: Rows, tokenizer: PreTrainedTokenizerBase, size: int = 640) -> list[str]:
    """Greedy answers, decoded up to `<end_of_turn>`."""
    device, result = next(model.parameters()).device.type, []
    for at in range(0, len(rows), size):
        prompts = [prompt for prompt, _, _ in rows[at : at + size]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        out = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), max_new_tokens=72, do_sample=False)
        result += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return result


def score(model: nn.Module, rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str, show: int = 0) -> float:
    """Print and return the exact match in percent."""
    given = answers(model.eval(), rows, tokenizer)
    exact = [answer.strip() == wanted for answer, (_, _, wanted) in zip(given, rows, strict=True)]
    off = [i for i, row in enumerate(rows) if '"out_of_scope"' in row[2]]
    valid = 0
    for answer in given:
        try:
            valid += isinstance(json.loads(answer), dict)
        except json.JSONDecodeError:
            pass
    false_alarm = sum('"out_of_scope"' in a for i, a in enumerate(given) if i not in set(off))
    recall = sum(exact[i] for i in off) / len(off)
    print(
        f"{name:44s} exact {sum(exact) / len(rows):6.1%}  json {valid / len(rows):6.1%}  out-of-scope {recall:6.1%}  false alarms {false_alarm}",
        flush=True,
    )
    for i in [i for i, right in enumerate(exact) if not right][:show]:
        print(f"      wanted {rows[i][2]}\n      given  {given[i].strip()}")
    return 100 * sum(exact) / len(rows)


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose matrices, embedding included, are rounded in blocks of 32 as Q8_0 or Q4_0 do."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            block = parameter.data.reshape(-1, 32)
            peak = block.gather(1, block.abs().argmax(1, keepdim=True))
            step = peak.abs() / 127 if bits == 8 else peak / -8
            whole = (block / step.where(step != 0, torch.ones_like(step))).round()
            parameter.data = ((whole if bits == 8 else whole.clamp(-8, 7)) * step).reshape(parameter.shape)
    return model


def main(folder: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    base = {
        name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).to(device)
        for name in ("teacher", "student")
    }
    train, test = load_rows("train", tokenizer), load_rows("test", tokenizer)
    for name, model in base.items():
        score(model, test, tokenizer, f"{name} base", show=2)
    runs = (
        [(120, 32, 2e-3), (180, 32, 1e-3), (180, 32, 3e-3), (180, 64, 2e-3)] if device == "cuda" else [(180, 32, 2e-3)]
    )
    teachers = []
    for steps, rank, lr in runs:
        tuned = tune(base["teacher"], train, steps, rank, lr)
        teachers.append((score(tuned, test, tokenizer, f"teacher, {steps} steps, r {rank}, lr {lr}", show=6), tuned))
    best = max(teachers, key=lambda pair: pair[0])[1]
    for bits in (8, 4):
        score(rounded(best, bits), test, tokenizer, f"  best teacher as Q{bits}_0")
    runs = [(150, 32, 3e-3), (250, 32, 3e-3), (250, 64, 2e-3)] if device == "cuda" else [(200, 32, 4e-3)]
    for steps, rank, lr in runs:
        for name, guide in (("direct", None), ("distilled", best)):
            tuned = tune(base["student"], train, steps, rank, lr, guide)
            score(tuned, test, tokenizer, f"student {name}, {steps} steps, r {rank}, lr {lr}", show=3 if guide else 0)
            for bits in (8, 4):
                score(rounded(tuned, bits), test, tokenizer, f"  as Q{bits}_0")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
