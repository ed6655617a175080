"""Tokenizers: loaded with the chat template of choice, copied beside a model, compared with another's."""

import shutil
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.engine.models import family_registry
from tasks.engine.models.model_config import require_file

# Files of a tokenizer and a processor: copied byte for byte, since saving them anew writes machine paths.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def load_tokenizer(model: ModelDir, chat_template: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter if it brought one, else the base's.

    `chat_template` is `model` (the tokenizer's own) or the name of a family's turns, for a base model that has none.
    """
    directory = _adapter_with_tokenizer(model) or model.base
    require_file(directory, "tokenizer_config.json", "the tokenizer")
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(directory, local_files_only=True))
    if chat_template != "model":
        template = family_registry.chat_template(chat_template)
        if template.token not in tokenizer.get_vocab():
            raise BadConfig(
                f"{directory}: no {template.token} in the vocabulary, so chat_template={chat_template} does not fit it"
            )
        tokenizer.chat_template = template.jinja
    return tokenizer


def copy_tokenizer(model: ModelDir, out: Path, chat_template: str = "model") -> None:
    """Copies a model's tokenizer and processor files, with the chat template that `chat_template` chooses.

    The adapter's tokenizer, if it brought one, is the one that its rows were tokenized with; files that it lacks come
    from the base.
    """
    adapter = _adapter_with_tokenizer(model)
    for name in TOKENIZER_FILES:
        source = adapter or model.base
        if adapter and not (adapter / name).is_file() and not name.startswith("chat_template"):
            source = model.base
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if chat_template != "model":
        template = load_tokenizer(model, chat_template).chat_template
        (out / "chat_template.jinja").write_text(cast(str, template), encoding="utf-8")


def require_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises BadConfig that names the first difference: distributions over different tokens cannot be compared."""
    vocabularies = [tokenizer.get_vocab() for tokenizer in (teacher, student)]
    if vocabularies[0] != vocabularies[1]:
        by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in vocabularies]
        first = next(i for i in range(max(map(len, by_id)) + 1) if by_id[0].get(i) != by_id[1].get(i))
        difference = (
            f"token {first} is {by_id[0].get(first)!r} in the teacher's and {by_id[1].get(first)!r} in the student's"
        )
    else:
        text = 'Turn  valve 17 on:\n\t{"intent": "Größe №5 🔧", "entities": {}}'
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (teacher, student)]
        if ids[0] == ids[1]:
            return
        first = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        difference = f"the vocabularies are equal but {text!r} is split differently from token {first} on"
    raise BadConfig(
        f"teacher and student have different tokenizers: {difference}. Distillation compares distributions token by "
        "token: choose a student of the teacher's family (Gemma-3 1B and 270M share theirs), or fine-tune it directly"
    )


def _adapter_with_tokenizer(model: ModelDir) -> Path | None:
    """The adapter's directory where it holds a tokenizer."""
    return model.adapter if model.adapter and (model.adapter / "tokenizer_config.json").is_file() else None
