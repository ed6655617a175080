"""A pico Gemma-3 with a real SentencePiece tokenizer, made in seconds: what stage tests run on."""

import io
from pathlib import Path

PICO_TEXT = """Turn the red valve on line 4 and report the pressure. Close audit 17 for the north hall.
{"intent": "close_audit", "entities": {"audit": "17", "hall": "north"}}
What is the weather like tomorrow? {"intent": "out_of_scope", "entities": {}}
Please check pump P-7 and measure 12.5 bar; the seal of mixer M-3 leaks oil near bay 9."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def pico_tokenizer(directory: Path) -> Path:
    """Trains a 400-piece BPE tokenizer with byte fallback and saves it as a Gemma tokenizer."""
    import sentencepiece
    from transformers import GemmaTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PICO_TEXT.splitlines() * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n"],
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = GemmaTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def pico_model(directory: Path, hidden: int = 64, layers: int = 2, seed: int = 0, **config: object) -> Path:
    """A random Gemma3ForCausalLM in bfloat16 with the pico tokenizer, saved in Hugging Face's layout."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    pico_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=512,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(settings | config))).to(torch.bfloat16)
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    return directory
