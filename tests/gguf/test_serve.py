"""What applications meet: Ollama's Modelfile, and llama.cpp's server through the OpenAI client."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.core.job import Job
from tasks.core.rows import Row
from tasks.engine.data.chat_template import encode, prompt_ids
from tasks.engine.models.families.gemma import GEMMA_TURNS
from tasks.engine.runtimes.llama_server import Server, llama_server
from tasks.gguf import GgufConfig
from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import open_conversion
from tasks.gguf.ollama import turn_template
from tasks.gguf.serving_files import modelfile
from tests.engine.data.test_chat_template import ROW, TALK, template
from tests.pico import CHAT_TEMPLATE

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_PREAMBLE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe {{kind}}.<|im_end|>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(narrow: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(narrow)


@pytest.fixture(scope="module")
def server(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with llama_server(bf16 / "model.gguf", tmp_path_factory.mktemp("server") / "log", context=512) as running:
        yield running


def test_the_openai_client(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain answers, a JSON schema, a stream, and both at once, over HTTP; the prompt is Hugging Face's."""
    client = OpenAI(base_url=server.url + "/v1", api_key=server.key)
    messages: Any = [{"role": "user", "content": "Close audit 17 for the north hall."}]
    plain = client.chat.completions.create(model="pico", messages=messages, max_tokens=16, temperature=0)
    assert plain.choices[0].message.content
    assert plain.usage and plain.usage.prompt_tokens == len(prompt_ids(tokenizer, messages))
    schema = {
        "type": "object",
        "properties": {"intent": {"enum": ["close_audit", "out_of_scope"]}, "line": {"type": "boolean"}},
        "required": ["intent", "line"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    options: Any = {"model": "pico", "messages": messages, "max_tokens": 64, "temperature": 0}
    constrained = client.chat.completions.create(**options, response_format=form)
    answer = json.loads(constrained.choices[0].message.content or "")
    assert answer["intent"] in ("close_audit", "out_of_scope") and isinstance(answer["line"], bool)
    streamed = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**options, response_format=form, stream=True)
        if chunk.choices
    ]
    assert len(streamed) > 2
    assert json.loads("".join(streamed)) == answer
    free = client.chat.completions.create(**(options | {"max_tokens": 16}), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in free if chunk.choices) == (
        plain.choices[0].message.content
    )


def test_training_generation_and_llama_cpp_have_the_same_ids(bf16: Path, narrow: Path, tmp_path: Path) -> None:
    """With Gemma 3's own template: what is learnt, Hugging Face's prompt, and that of llama.cpp's server."""
    tokenizer, text = AutoTokenizer.from_pretrained(narrow), template("gemma3")
    tokenizer.chat_template = text
    with open_conversion(bf16 / "model.gguf", "pico", Job(tmp_path / "work")) as conversion:
        plan = make_plan(conversion.layout, conversion.layout.options("BF16"), {"tokenizer.chat_template": text})
        conversion.write(plan, tmp_path / "model.gguf")
    with llama_server(tmp_path / "model.gguf", tmp_path / "log", context=512) as server:
        for row in (ROW, Row(messages=TALK)):
            trained = encode(tokenizer, row)
            prompt = server.post("/apply-template", messages=row.prompt)["prompt"]
            served = server.post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
            chat = server.post("/v1/chat/completions", messages=row.prompt, max_tokens=1)
            generated = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False)
            assert served == generated == trained.input_ids[: len(served)] == prompt_ids(tokenizer, row.prompt)
            assert chat["usage"]["prompt_tokens"] == len(served) and served.count(tokenizer.bos_token_id) == 1
            answered = row.answer + "<end_of_turn>"
            answer = server.post("/tokenize", content=answered, add_special=False, parse_special=True)
            assert answer["tokens"] == trained.answer_ids


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that `Turns.go` writes, interpreted."""
    tokens = re.split(r"(\{\{.*?\}\})", template)
    variables: dict[str, bool] = {}

    def value(expression: str, dot: dict[str, str]) -> bool:
        if expression.startswith("$"):
            return variables[expression]
        operator, field, literal = re.fullmatch(r"(eq|ne) (.+) \"(\w+)\"", expression).groups()  # type: ignore[union-attr]
        role = messages[0]["role"] if field == "(index .Messages 0).Role" else dot["role"]
        assert field in ("(index .Messages 0).Role", ".Role")
        return (role == literal) == (operator == "eq")

    def run(position: int, dot: dict[str, str], live: bool) -> tuple[str, int]:
        """Output from token `at` to the end, `else` or `end` that closes this block, and where that stands."""
        out = []
        while position < len(tokens):
            action = tokens[position][2:-2].strip() if tokens[position].startswith("{{") else None
            if action is None:
                out.append(tokens[position] if live else "")
            elif action == "end" or action.startswith("else"):
                break
            elif action == "range .Messages":
                for message in messages:
                    text, end = run(position + 1, message, live)
                    out.append(text)
                position = end
            elif action.startswith("if "):
                matched, condition = False, action.removeprefix("if ")
                while True:
                    active = live and not matched and (condition == "" or value(condition, dot))
                    text, position = run(position + 1, dot, active)
                    out.append(text)
                    matched, closing = matched or active, tokens[position][2:-2].strip()
                    if closing == "end":
                        break
                    condition = closing.removeprefix("else").strip().removeprefix("if ").strip()
            elif action == ".Content":
                out.append(dot["content"] if live else "")
            elif action == '"{{"':
                out.append("{{" if live else "")
            elif live:
                name, _, truth = re.fullmatch(r"(\$\w+) (:?=) (true|false)", action).groups()  # type: ignore[union-attr]
                variables[name] = truth == "true"
            position += 1
        return "".join(out), position

    return run(0, {}, True)[0]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GEMMA_TURNS.jinja, CHATML, WITH_PREAMBLE + CHATML])
@pytest.mark.parametrize("roles", ["u", "uau", "su", "suau", "uauau"])
def test_the_go_template_renders_hugging_faces_prompt(
    template: str, roles: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": f"text {i}: {role}?"} for i, role in enumerate(roles)]
    template = turn_template(tokenizer)
    assert template is not None
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_go(template.to_go(), messages) == expected.removeprefix("<bos>")
    assert template.render(messages) == expected.removeprefix("<bos>")


def test_a_template_beyond_turns_is_not_translated(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML + "{{ messages | length }}")
    assert turn_template(tokenizer) is None
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    assert turn_template(tokenizer) is None


def test_the_modelfile(narrow: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    template = turn_template(tokenizer)
    assert template
    text = modelfile(GgufConfig(context=1024), tokenizer, narrow, template.to_go())
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<end_of_turn>"\n' in text
    assert text.endswith("PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_ctx 1024\n")
