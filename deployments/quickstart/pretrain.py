"""Pre-train the quickstart's two bases on `pretrain_text`; about eight minutes on one H200, probes included.

    python -m deployments.quickstart.pretrain --out out                         # tokenizer, teacher, student, probes, bases.tar
    python -m deployments.quickstart.pretrain --out out --documents 2000 --minutes 0.2 0.2 --rows 8 --no-probe     # CPU smoke run

Needs torch, transformers and sentencepiece. Master weights are float32, the arithmetic is bf16, the learning rate follows the
clock: warm-up, then linearly to zero when the minutes are over. Weights are saved every minute.
"""

import argparse
import multiprocessing
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from deployments.quickstart import bases, tokenizer
from deployments.quickstart.pretrain_text import Piece, document

ROW = 256
OPEN_ROWS = 16
DROPOUT = 0.1
PEAK_LR = {"teacher": 3e-3, "student": 5e-3}


def encode(pieces: list[Piece], processor: "object", dropout: float) -> tuple[list[int], list[int]]:
    """Ids of a document and, for each, ten times the weight of predicting it.

    With `dropout` what the user says is split at random (BPE-dropout, arXiv 1910.13267), the answer never is: a base
    learns how pieces are spelled, which copying a word from mid-sentence to behind a quotation mark needs.
    """
    ids: list[int] = []
    weights: list[int] = []

    def split(text: str, user: bool) -> list[int]:
        sampled = {"enable_sampling": True, "alpha": dropout, "nbest_size": -1} if user and dropout else {}
        return processor.encode(text, **sampled)  # type: ignore[attr-defined]

    for text, weight in pieces:
        body = text.removesuffix("<eos>")
        new = [2] if text == "<bos>" else split(body, weight < 1.0) + ([1] if body != text else [])
        ids += new
        weights += [round(10 * weight)] * len(new)
    return ids, weights


def pack(job: tuple[int, int, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """`job` is (seed, documents, SentencePiece model): whole documents first-fit into rows (rows, ROW) of ids and weights."""
    import sentencepiece

    seed, documents, model = job
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(f"pretrain {seed}")
    full: list[tuple[list[int], list[int]]] = []
    rows: list[tuple[list[int], list[int]]] = []
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
    """All rows, generated on every core, shuffled and kept on the device: ids int16 and weights uint8, both (rows, ROW)."""
    start, workers = time.time(), multiprocessing.cpu_count()
    chunk = max(1, min(10_000, documents // workers))
    jobs = [(seed, chunk, model) for seed in range(documents // chunk)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(pack, jobs, chunksize=1)
    ids = torch.from_numpy(np.concatenate([part[0] for part in parts]).astype(np.int16)).to(device)
    weights = torch.from_numpy(np.concatenate([part[1] for part in parts])).to(device)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).to(device)
    print(
        f"{documents} documents, {int((ids > 0).sum()) / 1e6:.1f} M tokens in {len(ids)} rows, {time.time() - start:.0f} s",
        flush=True,
    )
    return ids[order], weights[order]


def weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, averaged with the pieces' weights. ids, weights: (rows, ROW)."""
    causal = {
        "full_attention": None,
        "sliding_attention": None,
    }  # rows are shorter than the window: plain causal attention
    logits = model(input_ids=ids, attention_mask=causal, use_cache=False).logits[:, :-1].float()
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten().float()
    return (each * weight).sum() / weight.sum().clamp(min=1)


def train(
    which: str, rows: tuple[torch.Tensor, torch.Tensor], files: Path, out: Path, minutes: float, batch: int
) -> torch.nn.Module:
    """Train one base for `minutes`, compile time not counted, and save it in out/which."""
    ids, weights = rows
    device = ids.device.type
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(files)
    torch.manual_seed(0)
    model = bases.build(which, len(tok), tok.convert_tokens_to_ids(bases.END_OF_TURN)).to(device)
    print(f"{which}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=torch.tensor(0.0) if device == "cuda" else 0.0, betas=(0.9, 0.98), fused=device == "cuda"
    )
    loss_of = torch.compile(weighted_loss) if device == "cuda" else weighted_loss
    start, saved, step, spent, losses = time.time(), time.time(), 0, 0.0, torch.zeros((), device=device)
    while spent < 1.0:
        at = (step * batch) % max(1, len(ids) - batch + 1)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, ids[at : at + batch].long(), weights[at : at + batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / 200) * max(0.0, 1.0 - spent)
        for group in optimizer.param_groups:
            if device == "cuda":
                group["lr"].fill_(PEAK_LR[which] * scale)
            else:
                group["lr"] = PEAK_LR[which] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.detach()
        step += 1
        if step == 5:
            losses.item()
            print(f"  compiled in {time.time() - start:.0f} s", flush=True)
            start = time.time()
        if step % 10 == 0:
            torch.cuda.synchronize() if device == "cuda" else None
            spent = (time.time() - start) / (60 * minutes)
        if step % 200 == 0:
            rate = step * batch * ROW / (time.time() - start) / 1e6
            print(
                f"  step {step} {spent:.0%} loss {losses.item() / 200:.4f} {rate:.2f} M tokens/s epoch {step * batch / len(ids):.2f}",
                flush=True,
            )
            losses.zero_()
            if time.time() - saved > 60:
                bases.save(model, files, out / which)
                saved = time.time()
    bases.save(model, files, out / which)
    print(f"{which}: {step} steps in {time.time() - start:.0f} s, saved in {out / which}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--minutes", type=float, nargs=2, default=(3.2, 2.5), metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--rows", type=int, default=256, help=f"rows of {ROW} tokens in a batch")
    parser.add_argument("--no-probe", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    files = args.out / "tokenizer"
    pieces = tokenizer.train()
    tokenizer.save(pieces, files)
    rows = make_rows(args.documents, pieces, device)
    for which, minutes in zip(("teacher", "student"), args.minutes, strict=True):
        train(which, rows, files, args.out, minutes, args.rows)
        with tarfile.open(args.out / "bases.tar", "w") as tar:
            for name in ("teacher", "student"):
                if (args.out / name).is_dir():
                    tar.add(args.out / name, arcname=name)
    if not args.no_probe:
        from deployments.quickstart import probe

        del rows
        probe.main(args.out)


if __name__ == "__main__":
    main()
