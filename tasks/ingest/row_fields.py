"""Table of the fields that common formats know beyond questions and answers, and what becomes of each.

    use_of("loss_mask")    # Use.SWITCH: spellings differ in case, `_`, `-` and spaces only

Fields that are in neither this table nor the row's shape change nothing about an answer as far as anyone can tell:
they are not read, and counted by name (`UnreadFields`). docs/data.md has the table (`python -m tests.ingest.fields`).
"""

import json
import re
from collections.abc import Collection, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple


class Use(StrEnum):
    """What becomes of a field; the text is that of docs/data.md."""

    SYSTEM = "the system message; refused where the row has a different one already"
    HISTORY = "turns before the question: pairs of question and answer, or messages; answers are learnt as others are"
    CONTEXT = "added to the question, as `input` is"
    SWITCH = (
        "0 or false: the answer is no label (a row of its own: quarantined); 1 or true: it is; anything else: refused"
    )
    OFF_SWITCH = "1 or true: the answer is no label (a row of its own: quarantined); 0 or false: it is; else: refused"
    MASK = "refused: what of the text it switches off cannot be told"
    PREFERENCE = "the row goes to `preference.jsonl`"
    GRADE = "refused: it grades the answer; beside a completion, `label` and `kto_tag` of true, false, 1 or 0 are KTO's"
    CANDIDATES = "refused: several answers, and which one is to be learnt cannot be told"
    TOOLS = "refused: it offers tools or calls them, and only text can be learnt"
    MEDIA = "refused: only text can be learnt"
    REASONING = "refused: the answer follows from a reasoning that would not be learnt"
    NOTE = "not read; counted by name"


class KnownField(NamedTuple):
    """Spellings of a field, the formats that have it, where (rows, messages, or both), and its use."""

    names: str
    formats: str
    place: str
    use: Use


FIELDS = (
    KnownField("system system_prompt system_message", "LLaMA-Factory, ms-swift, OpenOrca, Bedrock", "row", Use.SYSTEM),
    KnownField("systemInstruction system_instruction", "Vertex AI", "row", Use.SYSTEM),
    KnownField("history", "LLaMA-Factory, ms-swift", "row", Use.HISTORY),
    KnownField("context input", "Dolly, SQuAD, Alpaca", "row", Use.CONTEXT),
    KnownField("weight weights loss_weight sample_weight", "OpenAI, Together", "both", Use.SWITCH),
    KnownField("loss loss_scale compute_loss calculate_loss", "ms-swift", "both", Use.SWITCH),
    KnownField("train training trainable train_on train_on_turn learn learnable", "axolotl", "both", Use.SWITCH),
    KnownField("loss_mask", "axolotl, NeMo", "both", Use.SWITCH),
    KnownField("masked ignore skip exclude no_loss no_train", "torchtune", "both", Use.OFF_SWITCH),
    KnownField("mask token_mask label_mask loss_masks train_detail training_detail assistant_masks", "axolotl, TRL",
               "both", Use.MASK),
    KnownField("chosen rejected chosen_response rejected_response rejected_messages", "TRL, LLaMA-Factory, axolotl, "
               "ms-swift, Argilla", "row", Use.PREFERENCE),
    KnownField("preferred_output non_preferred_output", "OpenAI", "row", Use.PREFERENCE),
    KnownField("label labels kto_tag", "TRL, LLaMA-Factory, Label Studio, doccano", "both", Use.GRADE),
    KnownField("score scores rating ratings reward rewards grade rank ranking quality feedback preference is_correct "
               "is_good accepted desirable thumbs thumbs_up thumbs_down upvoted downvoted", "Argilla, Label Studio, "
               "UltraFeedback", "both", Use.GRADE),
    KnownField("generations candidates completions responses", "Argilla, UltraFeedback", "row", Use.CANDIDATES),
    KnownField("tools functions function_call tool_calls tool_call_id tool_choice parallel_tool_calls", "OpenAI, TRL, "
               "LLaMA-Factory, ms-swift", "both", Use.TOOLS),
    KnownField("images image videos video audios audio objects", "LLaMA-Factory, ms-swift, TRL", "both", Use.MEDIA),
    KnownField("reasoning_content reasoning thinking thought thoughts rationale chain_of_thought cot", "OpenAI, "
               "DeepSeek, TRL", "both", Use.REASONING),
    KnownField("id idx index uuid custom_id title category topic source dataset split url metadata meta tags text "
               "language created_at lead_time annotator annotation_id status error", "Dolly, SQuAD, Alpaca, Argilla, "
               "Label Studio, OpenAI batch output", "row", Use.NOTE),
    KnownField("answer_start is_impossible", "SQuAD", "row", Use.NOTE),
    KnownField("name refusal annotations channel", "OpenAI, TRL", "message", Use.NOTE),
    KnownField("chat_template_kwargs solution_steps rejected_rating chosen_rating", "TRL, Argilla", "row", Use.NOTE),
)  # fmt: skip
GRADE_ENDING = re.compile(r"(score|rating|reward|grade)s?$")  # quality_score, answer.rating
REMEDIES = {
    Use.MASK: "write weight 0 or 1 on whole messages",
    Use.GRADE: "keep the rows whose answers are to be learnt and take the field out",
    Use.CANDIDATES: "keep the answer that is to be learnt",
    Use.TOOLS: "write tools into the system message, and calls into the answers",
    Use.MEDIA: "take these rows out",
    Use.REASONING: "write it into the answer",
}
WHAT = {
    Use.MASK: "masks parts of the text",
    Use.GRADE: "grades the answer",
    Use.CANDIDATES: "holds several answers",
    Use.TOOLS: "offers or calls tools, and only text can be learnt",
    Use.MEDIA: "is no text, and only text can be learnt",
    Use.REASONING: "holds the reasoning before the answer, which would not be learnt",
}
ON, OFF = ("1", "1.0", "true", "yes", "on"), ("0", "0.0", "-0.0", "false", "no", "off")
EMPTY_TEXTS = ("", "[]", "{}", "null", "none")
MAX_EXAMPLE = 60
MAX_NAMES = 500


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


USES = {_folded(name): field.use for field in FIELDS for name in field.names.split()}


@lru_cache(maxsize=10_000)
def use_of(name: str) -> Use:
    """What becomes of a field of a row or a message that its shape does not name."""
    folded = _folded(name)
    return USES.get(folded) or (Use.GRADE if GRADE_ENDING.search(folded) else Use.NOTE)


@lru_cache(maxsize=10_000)
def is_plain(names: tuple[Any, ...], shape_fields: Collection[str]) -> tuple[str, ...] | None:
    """The unread fields among a row's `names`; None where one of them can change what the answer means."""
    others = [name for name in names if name not in shape_fields]
    return tuple(others) if all(isinstance(name, str) and use_of(name) is Use.NOTE for name in others) else None


def is_empty(value: Any) -> bool:
    """Whether a field's value says nothing: null, an empty text, list or object, also as text."""
    if isinstance(value, str):
        return len(value) < SHORTEST and value.strip().lower() in EMPTY_TEXTS
    return value is None or (isinstance(value, (list, dict)) and not value)


SHORTEST = 12  # characters; longer texts are not empty


def refuse(name: str, value: Any, use: Use, location: str = "") -> None:
    """Raises ValueError where a field that is not read changes what the answer means."""
    if use in REMEDIES and (value is not False or use is Use.GRADE):
        ignore = f"{REMEDIES[use]}, or name it in ignore_fields"
        raise ValueError(f"field {name!r}{location} {WHAT[use]}: {ignore}")


def is_learnt(name: str, value: Any, use: Use, location: str = "") -> bool:
    """Whether a switch is on. Raises ValueError for fractions, negative numbers and anything else but on or off."""
    text = str(value).strip().lower()
    if isinstance(value, (bool, int, float, str)) and text in (*ON, *OFF):
        return (text in ON) != (use is Use.OFF_SWITCH)
    raise ValueError(
        f"field {name!r}{location} is {shortened(value)}: an answer is learnt (1, true) or not (0, false), nothing in "
        "between; write one of these, or take the field out"
    )


def shortened(value: Any) -> str:
    """A value as JSON, cut to a few words."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_EXAMPLE else text[: MAX_EXAMPLE - 3] + "..."


class UnreadField(NamedTuple):
    """Rows that have a field which is not read, an example of its value, and where the first of them stands."""

    rows: int
    example: str
    first: str


class UnreadFields:
    """Counts the fields that are not read, by name; those of messages are named `messages[].name`."""

    def __init__(self) -> None:
        self.fields: dict[str, UnreadField] = {}

    def add(self, values: Mapping[str, Any], location: str) -> None:
        """Counts a row's unread fields."""
        for name, value in values.items():
            known = self.fields.get(name)
            if known:
                self.fields[name] = UnreadField(known.rows + 1, known.example, known.first)
            elif len(self.fields) < MAX_NAMES:
                self.fields[name] = UnreadField(1, shortened(value), location)

    def merge(self, fields: Mapping[str, UnreadField]) -> None:
        """Adds the counts of a later block of rows."""
        for name, field in fields.items():
            known = self.fields.get(name)
            if known or len(self.fields) < MAX_NAMES:
                self.fields[name] = known._replace(rows=known.rows + field.rows) if known else field
