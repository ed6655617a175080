from importlib.resources import files

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.data.chat_template import IGNORE, count_tokens, encode, end_of_turn_id, prompt_ids, stop_token_ids
from tasks.engine.data.tokenizers import load_tokenizer
from tests.pico import CHAT_TEMPLATE, PICO_TEXT, pico_tokenizer

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
def test_there_is_one_bos_whoever_adds_it(tokenizer, start):
    tokenizer.chat_template = start + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    assert encode(tokenizer, ROW).input_ids.count(tokenizer.bos_token_id) == (1 if start else 0)


def test_stop_tokens_are_end_of_turn_and_eos(tokenizer):
    assert stop_token_ids(tokenizer, None) == sorted([tokenizer.eos_token_id, end_of_turn_id(tokenizer)])
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == "<end_of_turn>"


def test_a_template_without_end_of_turn_gets_eos(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert encode(tokenizer, ROW).answer_ids[-1] == tokenizer.eos_token_id


def test_a_prompt_that_is_no_prefix_is_refused(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<start_of_turn>model\n' }}{% endif", "'<think>' }}{% endif")
    with pytest.raises(ValueError, match="not a prefix of the conversation: they differ behind .*<end_of_turn>"):
        encode(tokenizer, ROW)


def test_a_tokenizer_without_template_is_refused_with_the_remedy(tokenizer, directory):
    tokenizer.chat_template = None
    with pytest.raises(BadConfig, match="chat_template=gemma"):
        prompt_ids(tokenizer, ROW.prompt)
    gemma = load_tokenizer(ModelDir(directory), chat_template="gemma")
    turns = Row(messages=ROW.messages[1:])
    assert encode(gemma, turns) == encode(load_tokenizer(ModelDir(directory)), turns)
    written = "<start_of_turn>user\nAnswer with JSON.\n\nClose audit 17.<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(prompt_ids(gemma, ROW.prompt)) == "<bos>" + written


def template(name: str) -> str:
    """A model's own chat template, as TRL carries it."""
    return files("trl").joinpath(f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


def gemma_3n() -> str:
    """Gemma 3's, but for how pictures and sounds are marked."""
    image = "{%- if item['type'] == 'image' -%}\n                {{ '<start_of_image>' }}"
    audio = "{%- if item['type'] == 'audio' -%}{{ '<audio_soft_token>' }}{%- elif item['type'] == 'image' -%}"
    jinja = template("gemma3").replace(image, audio + "{{ '<image_soft_token>' }}")
    assert "audio_soft_token" in jinja
    return jinja


def byte_level(name: str, special: list[str], bos: str | None, eos: str) -> PreTrainedTokenizerBase:
    """A small byte-level BPE tokenizer, as Llama's and Qwen's are; one with a BOS writes it itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PICO_TEXT.replace("\n", "\n\n")] * 3, trainer)
    if bos:
        pair = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=pair)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template(name)
    return fast


@pytest.fixture(params=["gemma-3", "gemma-3n", "llama-3", "qwen-2.5"])
def chat_tokenizer(request, tokenizer) -> PreTrainedTokenizerBase:
    if request.param == "llama-3":
        marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return byte_level("llama3", marks, marks[0], marks[-1])
    if request.param == "qwen-2.5":
        return byte_level("qwen2_5", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>")
    tokenizer.chat_template = template("gemma3") if request.param == "gemma-3" else gemma_3n()
    return tokenizer


TALK = [
    Message(role="system", content="Answer with JSON."),
    Message(role="user", content="Close audit 17."),
    Message(role="assistant", content='{"audit": "17"}'),
    Message(role="user", content="And the valve?"),
    Message(role="assistant", content='{"valve": "red"}\n\n{"line": 4}'),
]
LABELS = [(None, [4]), ([2, 4], [2, 4]), ([2], [2])]


@pytest.mark.parametrize(("labels", "answers"), LABELS)
def test_labels_are_on_the_assistants_tokens_only(chat_tokenizer, labels, answers):
    """Every label is an answer or its end of turn, and stands where generation of that answer would begin."""
    row = Row(messages=TALK, labels=labels)
    example = encode(chat_tokenizer, row)
    end = chat_tokenizer.convert_ids_to_tokens(end_of_turn_id(chat_tokenizer))
    text = chat_tokenizer.decode(example.answer_ids, skip_special_tokens=False)
    assert text == "".join(TALK[index].content + end for index in answers)
    for index in answers:
        prompt = prompt_ids(chat_tokenizer, [message.model_dump() for message in TALK[:index]])
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt) - 1] == IGNORE and example.labels[len(prompt)] != IGNORE
    assert count_tokens(chat_tokenizer, [row, ROW]) == [
        len(example.input_ids),
        len(encode(chat_tokenizer, ROW).input_ids),
    ]


def test_bos_is_never_doubled(chat_tokenizer):
    """Llama's tokenizer and template each write one, Qwen has none: training and generation agree, and have one."""
    ids = encode(chat_tokenizer, ROW).input_ids
    bos = chat_tokenizer.bos_token_id
    assert ids.count(bos) == (bos is not None) and (bos is None or ids[0] == bos)
    generated = chat_tokenizer.apply_chat_template(ROW.prompt, add_generation_prompt=True, return_dict=False)
    assert generated == prompt_ids(chat_tokenizer, ROW.prompt) == ids[: len(generated)]


def test_an_answer_that_starts_with_a_line_break_is_tokenized_as_in_generation():
    """Qwen's opening ends in a line break, and two of them are one token: a whole text would hide the border."""
    tokenizer = byte_level("qwen2_5", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>")
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    row = Row(messages=[Message(role="user", content="Why?"), Message(role="assistant", content="\nBecause.")])
    example, prompt = encode(tokenizer, row), prompt_ids(tokenizer, row.prompt)
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.answer_ids) == "\nBecause.<|im_end|>"
