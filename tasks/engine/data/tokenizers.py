"""Whether two models speak of the same tokens."""

from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadConfig


def require_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises BadConfig that names the first difference: distributions over different tokens cannot be compared."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        by_id = [{index: token for token, index in vocab.items()} for vocab in (theirs, ours)]
        first = next(i for i in range(max(map(len, by_id)) + 1) if by_id[0].get(i) != by_id[1].get(i))
        what = f"token {first} is {by_id[0].get(first)!r} in the teacher's and {by_id[1].get(first)!r} in the student's"
    else:
        text = 'Turn  valve 17 on:\n\t{"intent": "Größe №5 🔧", "entities": {}}'
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (teacher, student)]
        if ids[0] == ids[1]:
            return
        first = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        what = f"the vocabularies are equal but {text!r} is split differently from token {first} on"
    raise BadConfig(
        f"teacher and student have different tokenizers: {what}. Distillation compares distributions token by token: "
        "choose a student of the teacher's family (Gemma-3 1B and 270M share theirs), or fine-tune it directly"
    )
