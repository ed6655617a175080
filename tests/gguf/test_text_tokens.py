"""A delivered GGUF reads special tokens that a text mentions as the text that training saw."""

from pathlib import Path

import pytest

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.data.chat_template import prompt_ids
from tasks.engine.data.literal_tokens import text_token_ids
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.runtimes.llama_server import llama_server
from tasks.gguf import GgufConfig
from tasks.gguf.header import TOKEN_TYPES, read_header
from tasks.gguf.run import convert
from tests.gguf.conftest import LOOSE
from tests.rows import write_rows

MENTIONED = ["<pad>", "<mask>", "<unk>", "<s>", "<|im_end|>", "[INST]", "<unused0>", "< end_of_turn >"]


@pytest.fixture(scope="module")
def delivered(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's output, whose proof compares llama.cpp's ids of these rows with training's, token by token."""
    directory = tmp_path_factory.mktemp("mentioned")
    rows = [[("user", f"Why {text} here?"), ("assistant", f"Because of {text}.")] for text in MENTIONED]
    messages = [[Message(role=role, content=text) for role, text in row] for row in rows]
    (directory / "data").mkdir()
    write_rows(directory / "data/test.jsonl", [Row(messages=row) for row in messages])
    config = GgufConfig(kind="BF16", **{**LOOSE, "proof_rows": len(MENTIONED)})
    report = convert(config, ModelDir(narrow), _made(directory / "out"), Job(directory / "work"), directory / "data")
    assert report.details["proof"]["rows"] == report.details["proof"]["prompts"] == len(MENTIONED)
    return directory / "out"


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_llama_cpp_reads_messages_as_training_does(narrow: Path, delivered: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelDir(narrow))
    types = read_header(delivered / "model.gguf").get(TOKEN_TYPES)
    assert {types[index] for index in text_token_ids(tokenizer)} == {5} and len(text_token_ids(tokenizer)) == 3
    with llama_server(delivered / "model.gguf", tmp_path / "log") as server:
        for text in MENTIONED:
            messages = [{"role": "user", "content": f"a {text} b"}]
            prompt = server.post("/apply-template", messages=messages)["prompt"]
            ids = server.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
            assert ids == prompt_ids(tokenizer, messages)
            assert f"a {text} b" in server.post("/detokenize", tokens=ids)["content"]
