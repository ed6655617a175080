"""Train the quickstart's tokenizer: SentencePiece BPE with byte fallback, laid out and templated as Gemma 3's is.

    python -m deployments.quickstart.tokenizer --out .scratch/tokenizer

It is trained on the pre-training text alone, so that no piece exists which the bases have never seen. The folder loads
with `AutoTokenizer` and llama.cpp's converter reads its `tokenizer.model`.
"""

import argparse
import io
import json
import random
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from deployments.quickstart.pretrain_text import document

VOCABULARY = 2048
DOCUMENTS = 60_000

CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


def corpus(documents: int) -> list[str]:
    """Lines of pre-training text without its turn marks."""
    rng = random.Random("tokenizer")
    text = ("".join(piece for piece, _ in document(rng)) for _ in range(documents))
    marks = ("<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>")
    return [line for doc in text for line in clean(doc, marks).split("\n") if line]


def clean(text: str, marks: tuple[str, ...]) -> str:
    """The text without any of `marks`."""
    for mark in marks:
        text = text.replace(mark, "")
    return text


def train(documents: int = DOCUMENTS, vocabulary: int = VOCABULARY) -> bytes:
    """A SentencePiece model with Gemma's ids: 0 pad, 1 eos, 2 bos, 3 unk, 4 mask, the turn marks, newline."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(documents)), model_writer=model, model_type="bpe", vocab_size=vocabulary,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n"],
        byte_fallback=True, split_digits=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def with_control_marks(model: bytes) -> bytes:
    """The model with its turn marks as control pieces.

    llama.cpp's converter takes user-defined pieces for ordinary text unless `tokenizer_config.json` has an
    `added_tokens_decoder`, which transformers 5 no longer writes; control pieces it always knows.
    """
    form = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # protobuf makes it at import
    proto = form.FromString(model)
    for piece in proto.pieces:
        if piece.piece in ("<mask>", "<start_of_turn>", "<end_of_turn>"):
            piece.type = form.SentencePiece.CONTROL
    return bytes(proto.SerializeToString())


def save(model: bytes, out: Path) -> None:
    """Write `tokenizer.model` and the Hugging Face files that `AutoTokenizer` loads."""
    model = with_control_marks(model)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").unlink(missing_ok=True)  # an older one would be loaded in place of the model's pieces
    (out / "tokenizer.model").write_bytes(model)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    config = {
        "tokenizer_class": "GemmaTokenizer",
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "padding_side": "left",
        "additional_special_tokens": turns,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    written = json.loads((out / "tokenizer_config.json").read_text())
    document = {
        key: value for key, value in written.items() if key not in ("vocab_file", "is_local", "local_files_only")
    }
    (out / "tokenizer_config.json").write_text(json.dumps(document, indent=2) + "\n")
    (out / "tokenizer.model").write_bytes(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    save(train(), parser.parse_args().out)
