"""Pre-train the quickstart's two bases on `pretrain_text`: 5.7 minutes of training on one H200, after making the rows.

    python -m deployments.quickstart.pretrain --out out          # tokenizer/, teacher/, student/, bases.tar
    python -m deployments.quickstart.pretrain --out out --documents 2000 --minutes 0.2 0.2 --rows 8   # smoke run, CPU

Needs torch, transformers and sentencepiece. Master weights are float32, the arithmetic on a GPU is bf16, the learning
rate follows the clock: warm-up, then linearly to zero when the minutes are over, so a run is not repeatable bit by bit.
Weights are saved every minute.
"""

import argparse
import multiprocessing
import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Gemma3ForCausalLM

from deployments.quickstart import bases, tokenizer
from deployments.quickstart.pretrain_text import Piece, document

ROW = 256
OPEN_ROWS = 16
DROPOUT = 0.1
WARM_UP = 200
PEAK_LR = {"teacher": 3e-3, "student": 5e-3}

Row = tuple[list[int], list[int]]
Ids = np.ndarray[tuple[int, int], np.dtype[np.uint16]]
Weights = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


def encode(pieces: list[Piece], processor: sentencepiece.SentencePieceProcessor, dropout: float) -> Row:
    """Ids of a document and, for each, ten times the weight of predicting it.

    With `dropout` what the user says is split at random (BPE-dropout, arXiv 1910.13267), the answer never is: a base
    learns how pieces are spelled, which copying a word from mid-sentence to behind a quotation mark needs.
    """
    ids: list[int] = []
    weights: list[int] = []

    def split(text: str, user: bool) -> list[int]:
        if user and dropout:
            return list(processor.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1))
        return list(processor.encode(text))

    for text, weight in pieces:
        body = text.removesuffix("<eos>")
        new = [2] if text == "<bos>" else split(body, weight < 1.0) + ([1] if body != text else [])
        ids += new
        weights += [round(10 * weight)] * len(new)
    return ids, weights


def pack(job: tuple[int, int, bytes]) -> tuple[Ids, Weights]:
    """Whole documents, first-fit into (rows, ROW) ids and weights; `job` is (seed, documents, SentencePiece model)."""
    seed, documents, model = job
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(f"pretrain {seed}")
    full: list[Row] = []
    rows: list[Row] = []
    for _ in range(documents):
        ids, weights = encode(document(rng), processor, DROPOUT if rng.random() < 0.3 else 0.0)
        if len(ids) > ROW:
            continue
        row = next((row for row in rows if len(row[0]) + len(ids) <= ROW), None)
        if row is None:
            if len(rows) == OPEN_ROWS:
                rows.sort(key=lambda r: len(r[0]))
                full.append(rows.pop())
            row = ([], [])
            rows.append(row)
        row[0].extend(ids)
        row[1].extend(weights)
    padded = [(ids + [0] * (ROW - len(ids)), weights + [0] * (ROW - len(weights))) for ids, weights in full + rows]
    return np.array([ids for ids, _ in padded], np.uint16), np.array([weights for _, weights in padded], np.uint8)


def make_rows(documents: int, model: bytes, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, shuffled, on the device: ids int16 and weights uint8, both (rows, ROW). Generated on every core."""
    start, workers = time.time(), multiprocessing.cpu_count()
    chunk = max(1, min(10_000, documents // workers))
    jobs = [(seed, chunk, model) for seed in range(documents // chunk)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(pack, jobs, chunksize=1)
    ids = torch.from_numpy(np.concatenate([part[0] for part in parts]).astype(np.int16)).to(device)
    weights = torch.from_numpy(np.concatenate([part[1] for part in parts])).to(device)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).to(device)
    tokens, seconds = int((ids > 0).sum()) / 1e6, time.time() - start
    print(f"{documents} documents, {tokens:.1f} M tokens in {len(ids)} rows, {seconds:.0f} s", flush=True)
    return ids[order], weights[order]


def weighted_loss(model: Gemma3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, averaged with the pieces' weights. ids, weights: (rows, ROW)."""
    # Rows are shorter than the sliding window, so plain causal attention is right for every layer.
    causal = {"full_attention": None, "sliding_attention": None}
    logits = model(input_ids=ids, attention_mask=causal, use_cache=False).logits[:, :-1].float()
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten().float()
    return (each * weight).sum() / weight.sum().clamp(min=1)


def adamw(model: Gemma3ForCausalLM, cuda: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices only. On CUDA its rate is a tensor, filled in place at every step."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.0) if cuda else 0.0, betas=(0.9, 0.98), fused=cuda)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clock(minutes: float, cuda: bool) -> Iterator[tuple[int, float, float]]:
    """(step, share of the minutes spent, seconds) until they are over; the first five steps compile and are free."""
    start, step, spent = time.time(), 0, 0.0
    while spent < 1.0:
        yield step, spent, time.time() - start
        step += 1
        if step == 5:
            if cuda:
                torch.cuda.synchronize()
            print(f"  first steps in {time.time() - start:.0f} s", flush=True)
            start = time.time()
        if step % 10 == 0:
            if cuda:
                torch.cuda.synchronize()
            spent = (time.time() - start) / (60 * minutes)


def train(
    which: str, rows: tuple[torch.Tensor, torch.Tensor], files: Path, out: Path, minutes: float, batch: int
) -> None:
    """Train one base for `minutes`, on `batch` rows a step, and save it with the tokenizer's `files` in out/which."""
    ids, weights = rows
    cuda = ids.is_cuda
    tok = AutoTokenizer.from_pretrained(files)
    torch.manual_seed(0)
    model = bases.build(which, len(tok), tok.get_vocab()[bases.END_OF_TURN])
    model.to(ids.device)  # type: ignore[arg-type]  # transformers' wrapper hides `self`
    print(f"{which}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = adamw(model, cuda)
    loss_of = torch.compile(weighted_loss) if cuda else weighted_loss
    losses, saved = torch.zeros((), device=ids.device), time.time()
    for step, spent, seconds in clock(minutes, cuda):
        if step and step % 200 == 0:
            speed, epoch = step * batch * ROW / seconds / 1e6, step * batch / len(ids)
            mean = losses.item() / 200
            print(f"  step {step} {spent:.0%} loss {mean:.4f} {speed:.2f} M tokens/s epoch {epoch:.2f}", flush=True)
            losses.zero_()
            if time.time() - saved > 60:
                bases.save(model, files, out / which)
                saved = time.time()
        offset = (step * batch) % max(1, len(ids) - batch + 1)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=cuda):
            loss = loss_of(model, ids[offset : offset + batch].long(), weights[offset : offset + batch])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_rate(optimizer, PEAK_LR[which] * min(1.0, (step + 1) / WARM_UP) * (1.0 - spent))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.detach()
    bases.save(model, files, out / which)
    print(f"{which}: {step + 1} steps, saved in {out / which}", flush=True)


def main() -> None:
    """Train the tokenizer, make the rows, train and save both bases, and pack them into one archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--minutes", type=float, nargs=2, default=(3.2, 2.5), metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--rows", type=int, default=256, help=f"rows of {ROW} tokens in a batch")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    files = args.out / "tokenizer"
    pieces = tokenizer.train()
    tokenizer.save(pieces, files)
    rows = make_rows(args.documents, pieces, "cuda" if torch.cuda.is_available() else "cpu")
    for which, minutes in zip(bases.SHAPES, args.minutes, strict=True):
        train(which, rows, files, args.out, minutes, args.rows)
    with tarfile.open(args.out / "bases.tar", "w") as tar:
        for which in bases.SHAPES:
            tar.add(args.out / which, arcname=which)


if __name__ == "__main__":
    main()
