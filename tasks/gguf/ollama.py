"""Translates a tokenizer's Jinja chat template to a Go template for Ollama, which does not run Jinja.

The template is inferred from conversations of marker texts that the tokenizer renders, and checked against others.
Templates that only wrap turns (Gemma's, ChatML, Llama's) are reproduced exactly; for one that does more, such as tools
or dates, `turn_template` returns None.
"""

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
SYSTEM, USER, ANSWER = "a-system-message", "a-first-question", "an-answer"
SECOND_USER, SECOND_ANSWER = "a-second-question", "one-more"


class TurnTemplate(NamedTuple):
    """The strings around the messages of a conversation, without BOS, which llama.cpp and Ollama add.

    A conversation is `preamble` (only without a system message) or `system` + text + `after_system`, then for each
    exchange `user` + text + `after_user` + answer + `after_answer`. The first `user` after a system message is left
    out where `joined`: Gemma has no system turn, and its first user turn begins with the system's text.
    """

    preamble: str
    system: str
    after_system: str
    user: str
    after_user: str
    after_answer: str
    joined: bool

    def render(self, messages: Messages) -> str:
        """The conversation as text, up to the start of the model's answer or behind its last one."""
        parts, joined = ["" if messages[0]["role"] == "system" else self.preamble], False
        for message in messages:
            text = message["content"]
            if message["role"] == "system":
                parts.append(self.system + text + self.after_system)
                joined = self.joined
            elif message["role"] == "user":
                parts.append(("" if joined else self.user) + text + self.after_user)
                joined = False
            else:
                parts.append(text + self.after_answer)
        return "".join(parts)

    def to_go(self) -> str:
        """The template for Ollama (Go's text/template)."""
        user = _go(self.user)
        if self.joined:
            user = "{{ if $joined }}{{ $joined = false }}{{ else }}" + user + "{{ end }}"
            opening, after_system = "{{ $joined := false }}", _go(self.after_system) + "{{ $joined = true }}"
        else:
            opening, after_system = "", _go(self.after_system)
        if self.preamble:
            opening += '{{ if ne (index .Messages 0).Role "system" }}' + _go(self.preamble) + "{{ end }}"
        return (
            opening
            + '{{ range .Messages }}{{ if eq .Role "system" }}' + _go(self.system) + "{{ .Content }}" + after_system
            + '{{ else if eq .Role "user" }}' + user + "{{ .Content }}" + _go(self.after_user)
            + '{{ else if eq .Role "assistant" }}{{ .Content }}' + _go(self.after_answer) + "{{ end }}{{ end }}"
        )  # fmt: skip


def turn_template(tokenizer: PreTrainedTokenizerBase) -> TurnTemplate | None:
    """The tokenizer's chat template as turns; None without one, or for one that does more than wrap turns."""
    if not tokenizer.chat_template:
        return None
    try:
        turns = _read(tokenizer)
        checks = [_messages(roles) for roles in ("u", "uau", "uauau", "su", "suau")]
        same = turns and all(_apply(tokenizer, messages, True) == turns.render(messages) for messages in checks)
    except (TemplateError, ValueError):  # the template refuses such a conversation, or changes its texts
        return None
    return turns if same else None


def _read(tokenizer: PreTrainedTokenizerBase) -> TurnTemplate | None:
    before, after_user, middle, _, after_answer = _around(
        tokenizer, "uaua", False, USER, ANSWER, SECOND_USER, SECOND_ANSWER
    )
    if not middle.startswith(after_answer) or not before.endswith(user := middle[len(after_answer) :]):
        return None
    system, after_system, _ = _around(tokenizer, "su", True, SYSTEM, USER)
    joined = not after_system.endswith(user)
    after_system = after_system if joined else after_system.removesuffix(user)
    return TurnTemplate(before.removesuffix(user), system, after_system, user, after_user, after_answer, joined)


def _around(tokenizer: PreTrainedTokenizerBase, roles: str, generation: bool, *marks: str) -> list[str]:
    text, parts = _apply(tokenizer, _messages(roles), generation), []
    for mark in marks:
        text_before, match, text = text.partition(mark)
        if not match:
            raise ValueError(f"the chat template leaves out {mark!r}")
        parts.append(text_before)
    return [*parts, text]


def _messages(roles: str) -> Messages:
    names, texts = {"s": "system", "u": "user", "a": "assistant"}, {"s": [SYSTEM], "u": [USER, SECOND_USER, "a-third"]}
    texts["a"] = [ANSWER, SECOND_ANSWER]
    return [{"role": names[role], "content": texts[role].pop(0)} for role in roles]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Any, generation: bool) -> str:
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def _go(text: str) -> str:
    """Literal text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
