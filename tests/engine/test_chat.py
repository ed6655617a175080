import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.chat import IGNORE, encode, end_ids, prompt_ids, turn_end
from tasks.engine.load import load_tokenizer
from tests.pico import CHAT_TEMPLATE, pico_tokenizer

ROW = Row(
    messages=[
        Message(role="system", content="Answer with JSON."),
        Message(role="user", content="Close audit 17."),
        Message(role="assistant", content='{"intent": "close_audit", "entities": {"audit": "17"}}'),
    ]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return pico_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(directory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def test_labels_are_the_answer_and_its_end_of_turn(tokenizer):
    example = encode(tokenizer, ROW)
    prompt = prompt_ids(tokenizer, ROW.prompt)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels == [IGNORE] * len(prompt) + example.input_ids[len(prompt) :]
    assert tokenizer.decode(example.answer_ids) == ROW.answer + "<end_of_turn>"
    assert example.input_ids.count(tokenizer.bos_token_id) == 1 and example.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_bos_is_there_once_if_the_template_writes_it_at_all(tokenizer, start):
    tokenizer.chat_template = start + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    assert encode(tokenizer, ROW).input_ids.count(tokenizer.bos_token_id) == (1 if start else 0)


def test_generation_stops_at_the_end_of_turn_and_at_eos(tokenizer):
    assert end_ids(tokenizer, None) == sorted([tokenizer.eos_token_id, turn_end(tokenizer)])
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == "<end_of_turn>"


def test_a_template_without_end_of_turn_gets_eos(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert encode(tokenizer, ROW).answer_ids[-1] == tokenizer.eos_token_id


def test_a_prompt_that_is_no_prefix_is_refused(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<start_of_turn>model\n' }}{% endif", "'<think>' }}{% endif")
    with pytest.raises(ValueError, match="not a prefix of the conversation: they part at token"):
        encode(tokenizer, ROW)


def test_a_base_model_without_template_says_what_to_set(tokenizer, directory):
    tokenizer.chat_template = None
    with pytest.raises(BadConfig, match="chat_template=gemma"):
        prompt_ids(tokenizer, ROW.prompt)
    gemma = load_tokenizer(ModelDir(directory), chat_template="gemma")
    turns = Row(messages=ROW.messages[1:])
    assert encode(gemma, turns) == encode(load_tokenizer(ModelDir(directory)), turns)
    written = "<start_of_turn>user\nAnswer with JSON.\n\nClose audit 17.<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(prompt_ids(gemma, ROW.prompt)) == "<bos>" + written
