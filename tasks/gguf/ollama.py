"""A chat template in Jinja as one in Go, for Ollama's Modelfile: read off from what it makes of marked conversations.

Ollama does not run Jinja. A template that writes turns one after the other (Gemma's, ChatML, Llama's) is found again
exactly; `turns` says None for one that does more, such as tools or dates.
"""

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
SYSTEM, USER, ANSWER, AGAIN, MORE = "a-system-message", "a-first-question", "an-answer", "a-second-question", "one-more"


class Turns(NamedTuple):
    """What stands around messages. BOS is left out: llama.cpp and Ollama add it.

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
        """The conversation up to where the model's answer begins, or behind its last one."""
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

    def go(self) -> str:
        """The same as a template for Ollama (Go's text/template)."""
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


def turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The turns of the tokenizer's template; None when it has none, or one that turns do not describe."""
    if not tokenizer.chat_template:
        return None
    try:
        found = _read(tokenizer)
        checks = [_messages(roles) for roles in ("u", "uau", "uauau", "su", "suau")]
        same = found and all(_apply(tokenizer, one, True) == found.render(one) for one in checks)
    except (TemplateError, ValueError):  # it refuses such a conversation, or does not keep its texts
        return None
    return found if same else None


def _read(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    before, after_user, between, _, after_answer = _around(tokenizer, "uaua", False, USER, ANSWER, AGAIN, MORE)
    if not between.startswith(after_answer) or not before.endswith(user := between[len(after_answer) :]):
        return None
    system, after_system, _ = _around(tokenizer, "su", True, SYSTEM, USER)
    joined = not after_system.endswith(user)
    after_system = after_system if joined else after_system.removesuffix(user)
    return Turns(before.removesuffix(user), system, after_system, user, after_user, after_answer, joined)


def _around(tokenizer: PreTrainedTokenizerBase, roles: str, generation: bool, *marks: str) -> list[str]:
    text, parts = _apply(tokenizer, _messages(roles), generation), []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"the chat template leaves out {mark!r}")
        parts.append(before)
    return [*parts, text]


def _messages(roles: str) -> Messages:
    names, texts = {"s": "system", "u": "user", "a": "assistant"}, {"s": [SYSTEM], "u": [USER, AGAIN, "a-third"]}
    texts["a"] = [ANSWER, MORE]
    return [{"role": names[role], "content": texts[role].pop(0)} for role in roles]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Any, generation: bool) -> str:
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    return text.removeprefix(str(tokenizer.bos_token)) if tokenizer.bos_token else text


def _go(text: str) -> str:
    """Literal text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
