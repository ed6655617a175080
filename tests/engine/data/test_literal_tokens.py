"""Special tokens that a text mentions are text, in training and generation alike."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.core.rows import Message, Row
from tasks.engine.data.chat_template import answer_opening, count_tokens, encode, prompt_ids
from tasks.engine.data.literal_tokens import encode_text, text_token_ids
from tasks.evaluate.inputs import decode_answer
from tests.engine.data.test_chat_template import byte_level
from tests.pico import pico_tokenizer

MENTIONED = ["<pad>", "<mask>", "<unk>", "<unused0>", "<s>", "[INST]", "<|image|>", "<|reserved_special_token_0|>"]


@pytest.fixture(scope="module", params=["gemma", "qwen", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    if request.param == "qwen":
        marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<mask>"]
        return byte_level("qwen2_5", marks, None, "<|im_end|>")
    if request.param == "llama":
        marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return byte_level("llama3", [*marks, "<|reserved_special_token_0|>", "<pad>"], marks[0], marks[3])
    return AutoTokenizer.from_pretrained(pico_tokenizer(tmp_path_factory.mktemp("pico") / "tokenizer"))


def row(text: str) -> Row:
    return Row(messages=[Message(role="user", content=text), Message(role="assistant", content=f"It is {text}.")])


@pytest.mark.parametrize("mention", MENTIONED)
def test_nothing_of_a_text_is_lost(tokenizer: PreTrainedTokenizerBase, mention: str) -> None:
    text = f"Why {mention} here?"
    example, prompt = encode(tokenizer, row(text)), prompt_ids(tokenizer, row(text).prompt)
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True).count(text) == 2
    assert set(text_token_ids(tokenizer)).isdisjoint(example.input_ids)
    assert count_tokens(tokenizer, [row(text)]) == [len(example.input_ids)]


def test_other_texts_have_the_tokenizers_own_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Turn the red valve.\n\n\tOn line 4", "", "<pad", "a < b > c 図 👍"]
    assert encode_text(tokenizer, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_token_of_turns_is_refused_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    mark = next(mark for mark in ("<end_of_turn>", "<|im_end|>", "<|eot_id|>") if mark in tokenizer.get_vocab())
    with pytest.raises(ValueError, match="message 1 holds the control token .*: take it out"):
        encode(tokenizer, row(f"a {mark} b"))
    with pytest.raises(ValueError, match="message 1 holds the control token"):
        prompt_ids(tokenizer, row(f"a {mark} b").prompt)


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_templates_own_opening_is_taken_off() -> None:
    tokenizer = byte_level("qwen2_5", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>")
    assert answer_opening(tokenizer) == ""
    tokenizer.chat_template = THINKING
    opening = answer_opening(tokenizer)
    assert opening == "<think>\n\n</think>\n\n"
    answer = encode(tokenizer, row("red")).answer_ids[:-1]
    assert decode_answer(tokenizer, answer) == "<think>\n\n</think>\n\nIt is red."
    assert decode_answer(tokenizer, answer, opening) == "It is red."
    for text in ("<think></think>It is red.", "<think>\n</think>\nIt is red.", "It is red."):
        assert decode_answer(tokenizer, encode_text(tokenizer, [text])[0], opening) == "It is red."
    thought = "<think>\nhm\n</think>\n\nIt is red."
    assert decode_answer(tokenizer, encode_text(tokenizer, [thought])[0], opening) == thought


def test_the_vocabulary_of_gemma_keeps_its_ids(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer(tmp_path / "tokenizer"))
    assert text_token_ids(tokenizer) == [0, 3, 400]
    ids = encode_text(tokenizer, ["<mask><end_of_turn>\n"])[0]
    assert ids[-2:] == tokenizer.convert_tokens_to_ids(["<end_of_turn>", "\n"]) and 400 not in ids
