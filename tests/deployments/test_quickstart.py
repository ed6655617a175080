"""The quickstart's rows are reproducible and held out; its bases load, fit their sizes and tokenize as Gemma does."""

import json
from pathlib import Path

import pytest

from deployments.quickstart import data, out_of_scope, pretrain_text, wordings

ROOT = Path(data.__file__).parent
CLOSED = {"status", "result", "quantity", "unit"}
BASES = ("teacher", "student")


def load(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def values(rows: list[dict[str, str]]) -> set[tuple[str, str]]:
    found = (json.loads(row["output"])["entities"].items() for row in rows)
    return {(key, value) for pairs in found for key, value in pairs if key not in CLOSED}


@pytest.mark.parametrize("name", data.SEEDS)
def test_generator_reproduces_the_file(name: data.Split) -> None:
    assert (ROOT / "data" / f"{name}.jsonl").read_bytes() == data.jsonl(name).encode()


@pytest.mark.parametrize(("name", "least", "off"), [("train", 1900, 330), ("validation", 440, 110), ("test", 440, 110)])
def test_counts(name: str, least: int, off: int) -> None:
    rows = load(name)
    assert len({row["instruction"] for row in rows}) == len(rows) >= least
    assert sum('"out_of_scope"' in row["output"] for row in rows) >= off


def test_answers_copy_their_commands_in_a_fixed_key_order() -> None:
    for row in load("train") + load("validation") + load("test"):
        answer = json.loads(row["output"])
        assert json.dumps(answer) == row["output"] and row["input"] == ""
        assert tuple(answer["entities"]) == wordings.INTENTS.get(answer["intent"], ())
        assert all(value in row["instruction"] for value in answer["entities"].values())


def test_held_out_rows_and_their_open_values_are_new() -> None:
    train, validation, test = load("train"), load("validation"), load("test")
    assert not values(train) & values(validation + test)
    files = [{row["instruction"] for row in rows} for rows in (train, validation, test)]
    assert len(set.union(*files)) == sum(map(len, files))


def test_held_out_wordings_are_new() -> None:
    for seen, held_out in wordings.WORDINGS.values():
        assert not set(seen) & set(held_out)
    assert not set(out_of_scope.TRAIN) & {*out_of_scope.TEST, *out_of_scope.NEW}


def test_pretraining_text_holds_no_row_and_no_intent() -> None:
    import random

    rng = random.Random(1)
    text = "".join(piece for _ in range(3000) for piece, _ in pretrain_text.document(rng))
    assert not any(f'"{intent}"' in text for intent in [*wordings.INTENTS, "out_of_scope"])
    assert not any(row["instruction"] in text for name in data.SEEDS for row in load(name))


@pytest.mark.parametrize(("which", "low", "high"), [("teacher", 3e6, 5e6), ("student", 1e6, 1.5e6)])
def test_base_loads_with_its_dimensions(which: str, low: float, high: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / which, dtype=torch.bfloat16)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    assert [kind == "full_attention" for kind in model.config.layer_types] == [False] * 5 + [True]
    rows = {p.shape[1] for p in model.parameters() if p.ndim == 2}
    assert all(row % 32 == 0 and (row % 256 == 0) is (which == "teacher") for row in rows), rows


def test_sizes() -> None:
    files = [path for which in BASES for path in (ROOT / which).iterdir()]
    assert sum(path.stat().st_size for path in files) < 14e6
    assert (ROOT / "teacher/tokenizer.json").read_bytes() == (ROOT / "student/tokenizer.json").read_bytes()


def test_tokenizer_is_laid_out_as_gemmas() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "student")
    assert tokenizer.convert_ids_to_tokens(range(7)) == [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    for text in ('Grüße 日本 🙂 {"a": "QX-731"}', "  two  spaces\n\nnew\tline "):
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    turn = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer(text, add_special_tokens=False).input_ids.count(2) == 1
    stop = json.loads((ROOT / "student/generation_config.json").read_text())["eos_token_id"]
    assert stop == [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
