"""The evaluate stage on a pico model, in Hugging Face and, from the same weights, in llama.cpp."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.core.command import Report
from tasks.core.errors import BadData, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.data.chat_template import prompt_ids, stop_token_ids
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.model_config import read_config
from tasks.evaluate import EvaluateConfig
from tasks.evaluate.generation import GenerationRequest, truncate
from tasks.evaluate.hf_generation import hf_engine
from tasks.evaluate.inputs import complete_json
from tasks.evaluate.llama_generation import llama_engine
from tasks.evaluate.run import evaluate
from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import open_conversion
from tasks.gguf.tensor_types import KindOptions
from tests.pico import pico_model
from tests.rows import write_rows

ROWS = 40
TURN_END = 5


class Pico(NamedTuple):
    model: Path
    gguf: Path
    dataset: Path


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A model whose answers differ from prompt to prompt and end early or late: the head is its own, not the
    embedding's (which would repeat the last token for ever), and its end of turn is loud."""
    directory = tmp_path_factory.mktemp("pico")
    model = pico_model(directory / "model", layers=6, tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][TURN_END] *= 2.2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (directory / "gguf").mkdir()
    with open_conversion(model, "pico", Job(directory / "work")) as conversion:
        conversion.write(make_plan(conversion.layout, KindOptions("F32", 6, 2)), directory / "gguf/model.gguf")
    (directory / "data").mkdir()
    write_rows(directory / "data/test.jsonl", [row(number) for number in range(ROWS)])
    train = ['{"intent": "close_audit", "entities": {}}', '{"intent": "out_of_scope", "entities": {}}']
    messages = [[Message(role="user", content="?"), Message(role="assistant", content=answer)] for answer in train]
    write_rows(directory / "data/train.jsonl", [Row(messages=one) for one in messages])
    return Pico(model, directory / "gguf", directory / "data")


def row(number: int) -> Row:
    answer = json.dumps({"intent": "close_audit", "entities": {"audit": str(number)}})
    question = f"Please close audit {number * number} of {'the north hall and ' * (number % 5)}bay {number}."
    return Row(messages=[Message(role="user", content=question), Message(role="assistant", content=answer)])


def run(
    pico: Pico,
    out: Path,
    model: ModelDir | None = None,
    gguf: Path | None = None,
    text: Path | None = None,
    **config: Any,
) -> Report:
    out.mkdir()
    few = {"max_new_tokens": 40, "batch_size": 16, "threads": 1, "latency_rows": 1, "perplexity_rows": 0}
    job = Job(out.with_suffix(".work"))
    return evaluate(EvaluateConfig(**(few | config)), model or ModelDir(pico.model), pico.dataset, out, job, gguf, text)


def predictions(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def one_by_one(pico: Pico, rows: int) -> list[str]:
    """The answers by a loop of plain forward passes: no batch, no padding, no cache, no generate()."""
    model = AutoModelForCausalLM.from_pretrained(pico.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(ModelDir(pico.model))
    ends, answers = stop_token_ids(tokenizer, read_config(pico.model)), []
    for number in range(rows):
        ids = prompt_ids(tokenizer, row(number).prompt)
        answer: list[int] = []
        while len(answer) < 40:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token in ends:
                break
            answer.append(token)
        answers.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    return answers


def test_hugging_face_and_llama_cpp_give_the_answers_of_a_plain_loop(pico: Pico, tmp_path: Path) -> None:
    hf = run(pico, tmp_path / "hf", perplexity_rows=4, latency_rows=2)
    llama = run(pico, tmp_path / "llama", gguf=pico.gguf, perplexity_rows=4, latency_rows=2)
    answers = [prediction["answer"] for prediction in predictions(tmp_path / "hf")]
    assert answers[:12] == one_by_one(pico, 12)
    lengths = {len(answer) for answer in answers}
    assert len(set(answers)) > ROWS // 2 and min(lengths) < 5 and max(lengths) > 30  # else it would prove nothing
    others = [prediction["answer"] for prediction in predictions(tmp_path / "llama")]
    equal = sum(a == b for a, b in zip(answers, others, strict=True))
    assert equal >= 0.85 * ROWS  # float32 sums in another order: a near tie may fall otherwise
    starts = sum(a[:3] == b[:3] for a, b in zip(answers, others, strict=True))
    assert starts >= 0.95 * ROWS
    tokens = [report.details["generated_tokens"] for report in (hf, llama)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.15)
    assert hf.facts["rows"] == llama.facts["rows"] == ROWS
    assert hf.facts["bytes"] == (pico.model / "model.safetensors").stat().st_size
    assert llama.facts["bytes"] == (pico.gguf / "model.gguf").stat().st_size
    assert min(float(report.facts["tokens_per_second"]) for report in (hf, llama)) > 0
    assert {"json_valid", "intent_accuracy", "exact_match"} <= hf.facts.keys()
    assert hf.facts["held_out_perplexity"] == pytest.approx(llama.facts["held_out_perplexity"], rel=1e-3)
    for report in (hf, llama):
        assert 0 < report.facts["first_token_ms"] <= report.facts["latency_p50_ms"] <= report.facts["latency_p99_ms"]  # type: ignore[operator]
        assert len(report.details["latencies_ms"]) == 2 and report.facts["alone_tokens_per_second"] > 0  # type: ignore[operator]
    weights = [json.loads((tmp_path / name / "scores.json").read_text())["parameters"] for name in ("hf", "llama")]
    assert weights[0]["parameters"] == weights[1]["parameters"] and weights[0]["stored_as"].keys() == {"float32"}
    assert weights[1]["stored_as"].keys() == {"F32"} and weights[0]["largest"] > 0


def test_outputs_do_not_depend_on_batches_or_time(pico: Pico, tmp_path: Path) -> None:
    for name, gguf_dir in (("hf", None), ("llama", pico.gguf)):
        for time in "12":
            run(pico, tmp_path / f"{name}{time}", gguf=gguf_dir, limit_rows=20)
        for file in ("scores.json", "predictions.jsonl", "report/mistakes.md", "report/confusion.png"):
            assert (tmp_path / f"{name}1" / file).read_bytes() == (tmp_path / f"{name}2" / file).read_bytes(), file
    run(pico, tmp_path / "small", limit_rows=20, batch_size=3)  # each slot is filled again several times
    pairs = zip(predictions(tmp_path / "hf1"), predictions(tmp_path / "small"), strict=True)
    assert sum(a == b for a, b in pairs) >= 19


def test_scores_and_pages_are_of_these_answers(pico: Pico, tmp_path: Path) -> None:
    first = run(pico, tmp_path / "first", limit_rows=10)
    answers = {prediction["row"]: prediction["answer"] for prediction in predictions(tmp_path / "first")}
    assert list(answers) == list(range(0, 40, 4)) and first.facts["exact_match"] == 0.0
    right = tmp_path / "right"
    right.mkdir()
    rows = [Row(messages=[row(i).messages[0], Message(role="assistant", content=answers[i] or "?")]) for i in answers]
    write_rows(right / "test.jsonl", rows)
    report = run(pico._replace(dataset=right), tmp_path / "second", mistakes=2)
    expected = sum(bool(answer) for answer in answers.values()) / 10
    assert 0 < expected == report.facts["exact_match"]
    page = (tmp_path / "first/report/mistakes.md").read_text()
    assert "10 of 10 answers" in page and "## Row 36" in page and row(36).messages[0].content in page
    assert (tmp_path / "second/report/mistakes.md").read_text().count("## Row") <= 2
    assert not (tmp_path / "second/report/confusion.png").exists()  # free text has no intents


def test_an_adapter_is_asked_with_its_base(pico: Pico, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico.model, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    run(pico, tmp_path / "base", limit_rows=10)
    report = run(pico, tmp_path / "adapted", ModelDir(pico.model, tmp_path / "adapter"), limit_rows=10)
    assert predictions(tmp_path / "base") != predictions(tmp_path / "adapted")
    weights = [pico.model / "model.safetensors", tmp_path / "adapter/adapter_model.safetensors"]
    assert report.facts["bytes"] == sum(path.stat().st_size for path in weights)


def test_broken_weights_and_logits_fail_with_tensor_and_row(pico: Pico, tmp_path: Path) -> None:
    for value, said in ((float("nan"), "holds NaN or infinite weights"), (3e38, "row .* logits are")):
        broken = tmp_path / f"broken{value}"
        broken.mkdir()
        for file in pico.model.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        weights = load_file(broken / "model.safetensors")
        weights["model.norm.weight"][:] = value
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(GateFailed, match=said):
            run(pico, tmp_path / f"hf{value}", ModelDir(broken))
        reader = gguf.GGUFReader(_copy(pico.gguf / "model.gguf", broken), "r+")
        norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
        norm.data[:] = np.float32(value)
        reader.data.flush()
        with pytest.raises(GateFailed, match=said):
            run(pico, tmp_path / f"llama{value}", gguf=broken, warmup_rows=0)


def test_answers_held_to_the_schema_keep_to_it(pico: Pico, tmp_path: Path) -> None:
    for name, directory in (("hf", None), ("llama", pico.gguf)):
        report = run(pico, tmp_path / name, gguf=directory, limit_rows=6, constrained_rows=3, max_new_tokens=200)
        found = json.loads((tmp_path / name / "scores.json").read_text())["constrained"]
        assert found["held"]["rows"] == found["free"]["rows"] == 3
        assert found["held"]["json_valid"] == found["held"]["schema_valid"] == 1.0, name
        assert found["free"]["json_valid"] == report.facts["json_valid"] == 0.0  # a random model says no JSON
        assert report.facts["constrained_tokens_per_second"] > 0  # type: ignore[operator]
        assert "held_out_perplexity" not in report.facts
    assert json.loads((tmp_path / "hf/schema.json").read_text())["anyOf"][0]["required"] == ["intent", "entities"]


def test_perplexity_is_that_of_plain_forward_passes(pico: Pico, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "general.txt").write_text("Turn the red valve on line 4 and report the pressure.\n" * 40)
    report = run(pico, tmp_path / "hf", text=text, text_tokens=600, limit_rows=8, perplexity_rows=8)
    model = AutoModelForCausalLM.from_pretrained(pico.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(ModelDir(pico.model))
    ids = tokenizer((text / "general.txt").read_text(), add_special_tokens=False)["input_ids"][:600]
    windows = [[2, *ids[start : start + 256]] for start in range(0, 600, 256)]
    with torch.no_grad():
        losses = [model(torch.tensor([one])).logits[0, :-1].log_softmax(-1) for one in windows]
    nats = -sum(float(loss[range(len(one) - 1), one[1:]].sum()) for loss, one in zip(losses, windows, strict=True))
    assert report.facts["general_perplexity"] == pytest.approx(np.exp(nats / 600), rel=1e-4)
    assert json.loads((tmp_path / "hf/scores.json").read_text())["perplexity"]["general"]["tokens"] == 600
    file = run(pico, tmp_path / "llama", gguf=pico.gguf, text=text, text_tokens=600, limit_rows=8)
    assert file.facts["general_perplexity"] == pytest.approx(np.exp(nats / 600), rel=1e-3)
    with pytest.raises(BadData, match="holds no text"):
        run(pico, tmp_path / "none", text=pico.dataset, limit_rows=2)


def test_an_answer_ends_where_it_is_whole(pico: Pico, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelDir(pico.model))
    prompts = [prompt_ids(tokenizer, row(number).prompt) for number in range(9)]
    ends = frozenset(stop_token_ids(tokenizer, read_config(pico.model)))
    request = GenerationRequest(list(range(9)), prompts, ends, 40, 4, 1)
    short = request._replace(is_complete=lambda ids: len(ids) == 3)
    answers = []
    for prompts_and_limits in (request, short):
        with hf_engine(ModelDir(pico.model), tokenizer, prompts_and_limits, "original", Job(tmp_path)) as engine:
            answers.append(engine.generate(range(9)))
    with llama_engine(pico.gguf / "model.gguf", short, Job(tmp_path)) as engine:
        answers.append(engine.generate(range(9)))
    assert [ids[:3] for ids in answers[0].answers] == answers[1].answers == answers[2].answers
    assert answers[1].tokens < answers[0].tokens
    is_complete = complete_json(tokenizer)
    ids = tokenizer('{"a": {"b": "}"}} and more', add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(truncate(ids, request._replace(is_complete=is_complete))).strip() == '{"a": {"b": "}"}}'


def test_four_and_eight_bits(pico: Pico, tmp_path: Path) -> None:
    plain = run(pico, tmp_path / "plain", limit_rows=4, perplexity_rows=4)
    assert plain.facts["format"] == "bfloat16"
    sizes = [int(plain.facts["bytes"])]
    for name, near in (("int8", 0.05), ("nf4", 0.3)):
        report = run(pico, tmp_path / name, limit_rows=4, load_in=name, perplexity_rows=4)
        assert report.facts["format"] == name
        parameters = [json.loads((tmp_path / n / "scores.json").read_text())["parameters"] for n in (name, "plain")]
        assert parameters[0]["parameters"] == parameters[1]["parameters"]
        assert parameters[0]["stored_as"][name] > 100_000
        ratio = report.facts["held_out_perplexity"] / plain.facts["held_out_perplexity"]  # type: ignore[operator]
        assert ratio == pytest.approx(1, rel=near) and ratio != 1, name
        sizes.append(parameters[0]["stored_bytes"])
    assert sizes[1] > sizes[2]


def _copy(file: Path, directory: Path) -> Path:
    (directory / file.name).write_bytes(file.read_bytes())
    return directory / file.name


def test_what_cannot_be_evaluated_says_why(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="prompt tokens; with max_new_tokens=2040 that is more than .* 2048"):
        run(pico, tmp_path / "long", max_new_tokens=2040)
    with pytest.raises(BadData, match="model.gguf is not there"):
        run(pico, tmp_path / "none", gguf=tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(GateFailed, match="llama.cpp could not load"):
        run(pico, tmp_path / "damaged", gguf=tmp_path)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(BadData, match="nothing to evaluate on"):
        run(pico._replace(dataset=tmp_path), tmp_path / "empty")


def test_the_command_says_one_line_and_llama_cpp_none(pico: Pico, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"limit_rows": 2, "max_new_tokens": 3}')
    arguments = ["--model", pico.model, "--dataset", pico.dataset, "--gguf", pico.gguf, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "tasks.evaluate.run", config, *map(str, arguments)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    [said] = done.stderr.splitlines()
    assert said.startswith(f"{tmp_path / 'out'}; json_valid ") and said.endswith("; rows 2")
    assert "model" in (tmp_path / "out.work/llama.log").read_text()
    assert json.loads((tmp_path / "out/report.json").read_text())["facts"]["rows"] == 2
