"""Seeded text for pre-training the quickstart's bases: other domains, random schemas, values to copy.

    python -m deployments.quickstart.pretrain_text 20          # prints 20 documents

None of it comes from the quickstart's data. A document is a list of (text, weight) pieces: 1.0 where the model has to
learn to answer, less where a user speaks, since random commands cannot be predicted. Half of the chats name their
schema in the prompt, some repeat one schema over several turns, and the rest belong to 800 schemas that keep their
wordings, so that a base learns to read a schema, to pick one up from its context and to remember one.
"""

import functools
import json
import random
import string
import sys
from collections.abc import Callable

from deployments.quickstart import pretrain_words as w

Piece = tuple[str, float]
PROMPT_WEIGHT = 0.2
SCHEMAS = 800


def pseudo(rng: random.Random) -> str:
    """A word that does not exist, of one to three syllables."""
    return "".join(
        rng.choice(w.ONSETS) + rng.choice(w.VOWELS) + rng.choice(w.CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )


def word(rng: random.Random, words: list[str]) -> str:
    """A word of the list, or sometimes one that does not exist."""
    return rng.choice(words) if rng.random() < 0.82 else pseudo(rng)


def thing(rng: random.Random) -> str:
    """A short noun phrase."""
    noun = word(rng, w.NOUNS)
    return rng.choice(
        [
            noun,
            f"{word(rng, w.ADJECTIVES)} {noun}",
            f"{word(rng, w.NOUNS)} {noun}",
            f"{word(rng, w.ADJECTIVES)} {noun}",
            f"{word(rng, w.ADJECTIVES)} {word(rng, w.NOUNS)} {noun}",
            f"{noun}s",
            f"{word(rng, w.ADJECTIVES)} {noun}s",
        ]
    )


def task(rng: random.Random) -> str:
    """A verb phrase."""
    return f"{word(rng, w.VERBS)} {rng.choice(['the ', 'the ', 'a ', 'all ', '', 'new '])}{thing(rng)}"


def person(rng: random.Random) -> str:
    """A first name, a last name, or both."""
    first = rng.choice(w.FIRST) if rng.random() < 0.6 else pseudo(rng).capitalize()
    last = rng.choice(w.LAST) if rng.random() < 0.6 else pseudo(rng).capitalize()
    return rng.choice([first, last, f"{first} {last}", f"{first} {last}", f"{first[0]}. {last}"])


def identifier(rng: random.Random) -> str:
    """A made-up code such as QX-731, B 20, KT48210-C or NOR-24-007."""
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.choice((1, 2, 2, 2, 3, 3, 4))))
    digits = "".join(rng.choices(string.digits, k=rng.choice((1, 2, 3, 3, 4, 5))))
    suffix = rng.choice(
        ["", "", "", f"-{rng.choice(string.ascii_uppercase)}", f"-{rng.randint(0, 999):03d}", f"/{rng.randint(1, 99)}"]
    )
    return letters + rng.choice(["-", "-", "-", "", "", " "]) + digits + suffix


def number(rng: random.Random) -> str:
    """A whole number of one to four digits, or a decimal fraction."""
    return rng.choice(
        [
            str(rng.randint(0, 9)),
            str(rng.randint(10, 99)),
            str(rng.randint(100, 9999)),
            f"{rng.randint(0, 99)}.{rng.randint(0, 99)}",
        ]
    )


def date(rng: random.Random) -> str:
    """A day as people write it."""
    month, day, year = rng.choice(w.MONTHS), rng.randint(1, 28), rng.randint(1990, 2040)
    return rng.choice(
        [
            f"{month} {day}",
            f"{day} {month}",
            f"{month} {day}, {year}",
            f"{day:02d}.{rng.randint(1, 12):02d}.{year}",
            rng.choice(w.WEEKDAYS),
            f"{rng.choice(['next', 'this', 'last'])} {rng.choice(w.WEEKDAYS)}",
            rng.choice(["tomorrow", "today", "tonight"]),
            f"{month} {year}",
        ]
    )


def span(rng: random.Random) -> str:
    """A stretch of time."""
    unit = rng.choice(["day", "week", "month", "hour", "year", "season", "term", "night"])
    return rng.choice(
        [
            f"the last {unit}",
            f"the {rng.choice(['past', 'next', 'first'])} {rng.randint(2, 99)} {unit}s",
            f"last {unit}",
            f"{unit} {rng.randint(1, 50)}",
            f"the {rng.choice(['first', 'second', 'final'])} {unit}",
            f"this {unit}",
            f"the {rng.choice(['past', 'last'])} {pseudo(rng)} {unit}s",
        ]
    )


def site(rng: random.Random) -> str:
    """A place, in town or at home."""
    noun = word(rng, w.NOUNS)
    return rng.choice(
        [
            rng.choice(w.SITES),
            f"the {word(rng, w.ADJECTIVES)} {noun}",
            f"{noun} {rng.randint(1, 60)}",
            f"the {word(rng, w.NOUNS)} {noun}",
            f"{noun} {rng.choice(string.ascii_uppercase)}",
            rng.choice(w.CITIES),
            f"the {noun}",
        ]
    )


# Type of a slot -> how its value is drawn.
DRAW: dict[str, Callable[[random.Random], str]] = {
    "thing": thing,
    "problem": thing,
    "person": person,
    "date": date,
    "span": span,
    "id": identifier,
    "place": site,
    "count": number,
    "task": task,
    "state": lambda rng: rng.choice(w.STATES),
    "measure": lambda rng: rng.choice(w.MEASURES),
    "amount": lambda rng: f"{number(rng)}\t{rng.choice(w.UNITS)}",
}


class Schema:
    """One made-up command: its answer's shape, its entity keys and a few wordings, all fixed by the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.verb, self.noun = word(rng, w.VERBS), word(rng, w.NOUNS)
        self.intent = rng.choice(
            [f"{self.verb}_{self.noun}", f"{self.verb}_{self.noun}", self.noun, f"{self.noun}_{self.verb}", self.verb]
        )
        self.outer = rng.choice(w.SHAPES)
        family = rng.random() < 0.5
        kinds, natural = (
            rng.choice(w.FAMILIES) if family else (rng.sample(list(DRAW), k=rng.choice((1, 2, 2, 3, 3, 4))), [])
        )
        self.types = list(kinds)
        self.keys = [rng.choice(w.KEYS[kind]) for kind in kinds]
        self.keys = [f"{key}{i}" if self.keys.index(key) < i else key for i, key in enumerate(self.keys)]
        self.order = rng.sample(range(len(kinds)), k=len(kinds))
        self.wordings = (
            rng.sample(natural, k=rng.choice((4, 6)))
            if natural
            else [self.wording(rng) for _ in range(rng.choice((4, 6, 8)))]
        )

    def wording(self, rng: random.Random) -> str:
        """A sentence with a field for every slot, in any order, around the schema's verb and noun."""
        head = rng.choice(w.HEADS).format(v=self.verb, n=self.noun, V=self.verb.capitalize(), N=self.noun.capitalize())
        phrases = [rng.choice(w.PHRASES[kind]).format(f"{{{i}}}") for i, kind in enumerate(self.types)]
        rng.shuffle(phrases)
        parts = [head, *phrases] if head else phrases
        if rng.random() < 0.4:
            first = phrases[0] + (
                rng.choice([" has", " is", ":", " was", " needs", " shows", ","]) if rng.random() < 0.5 else ""
            )
            parts = [first, *([head] if head else []), *phrases[1:]]
        joint = rng.choice([" ", " ", " ", " ", ", ", "; ", " and "])
        return "".join(
            (rng.choice([" ", " ", joint]) if i else "") + part for i, part in enumerate(parts)
        ) + rng.choice("...?!")

    def hint(self) -> str:
        """The schema as a prompt names it."""
        return f"{self.outer[0]}={self.intent} {self.outer[1]}={' '.join(self.keys[i] for i in self.order)}"

    def example(self, rng: random.Random) -> tuple[str, str]:
        """A command and its JSON answer, with fresh values."""
        drawn = [DRAW[kind](rng) for kind in self.types]
        text = rng.choice(self.wordings).format(*(value.replace("\t", " ") for value in drawn))
        opener = rng.choice(w.OPENERS)
        if rng.random() < 0.7:
            text = text[0].upper() + text[1:] if not opener and self.types else text
        pairs = [(self.keys[i], drawn[i]) for i in self.order]
        inner = {k: v for key, value in pairs for k, v in zip(key.split(), value.split("\t"), strict=True)}
        return opener + text + rng.choice(w.CLOSERS), json.dumps(
            {self.outer[0]: self.intent, self.outer[1]: inner}, ensure_ascii=False
        )


@functools.cache
def remembered(index: int) -> Schema:
    """One of the schemas that keep their wordings for the whole of pre-training."""
    return Schema(random.Random(f"schema {index}"))


def fill(rng: random.Random) -> dict[str, str]:
    """Random words for the fields of a question or of a plain sentence, drawn once a document."""
    noun, other = word(rng, w.NOUNS), word(rng, w.NOUNS)
    return {
        "noun": noun,
        "noun2": other,
        "nouns": noun + "s",
        "nouns2": other + "s",
        "adj": word(rng, w.ADJECTIVES),
        "adj2": word(rng, w.ADJECTIVES),
        "verb": word(rng, w.VERBS),
        "verb2": word(rng, w.VERBS),
        "name": person(rng),
        "name2": person(rng),
        "city": rng.choice(w.CITIES),
        "n": number(rng),
        "m": number(rng),
        "year": str(rng.randint(1500, 2040)),
        "day": date(rng),
        "place": site(rng),
        "id": identifier(rng),
        "id2": identifier(rng),
    }


def chat(turns: list[tuple[str, str]], first: float = 1.0) -> list[Piece]:
    """Turns in Gemma's chat format; `first` is the weight of the first answer, which may be a guess."""
    pieces: list[Piece] = [("<bos>", 0.0)]
    for command, answer in turns:
        pieces.append((f"<start_of_turn>user\n{command}<end_of_turn>\n<start_of_turn>model\n", PROMPT_WEIGHT))
        pieces.append((f"{answer}<end_of_turn>\n", first if len(pieces) == 2 else 1.0))
    return pieces


def listing(rng: random.Random) -> tuple[str, str]:
    """Small exercises in copying: repeat, sort out, put in quotes, list as JSON."""
    values = [rng.choice([identifier, number, thing, person, date, site, task])(rng) for _ in range(rng.randint(1, 4))]
    kind = rng.randrange(4)
    if kind == 0:
        return "Repeat: " + ", ".join(values), ", ".join(values)
    if kind == 1:
        return "List: " + "; ".join(values), json.dumps(values)
    if kind == 2:
        return f"Which comes last: {', '.join(values)}?", values[-1]
    keys = rng.sample(w.NOUNS, k=len(values))
    return " and ".join(f"{key} is {value}" for key, value in zip(keys, values, strict=True)) + ".", json.dumps(
        dict(zip(keys, values, strict=True))
    )


def document(rng: random.Random) -> list[Piece]:
    """One document: a chat on a remembered, a named or a repeated schema, an exercise, a question, or plain text."""
    kind = rng.random()
    if kind < 0.35:
        return chat([remembered(rng.randrange(SCHEMAS)).example(rng)])
    if kind < 0.60:
        schema = Schema(rng)
        command, answer = schema.example(rng)
        if rng.random() < 0.12:
            form = rng.choice(w.QUESTIONS)[0]
            command, answer = form.format(**fill(rng)), json.dumps({schema.outer[0]: "none", schema.outer[1]: {}})
        return chat([(rng.choice([f"{schema.hint()}\n{command}", f"{command}\n{schema.hint()}"]), answer)])
    if kind < 0.70:
        schema = Schema(rng)
        return chat([schema.example(rng) for _ in range(rng.choice((2, 3)))], first=PROMPT_WEIGHT)
    if kind < 0.87:
        return chat([listing(rng)])
    if kind < 0.95:
        form, reply = rng.choice(w.QUESTIONS)
        words = fill(rng)
        return chat(
            [(rng.choice(w.OPENERS) + form.format(**words) + rng.choice(w.CLOSERS), reply.format(**words))], first=0.5
        )
    return [
        ("<bos>", 0.0),
        (" ".join(rng.choice(w.PLAIN).format(**fill(rng)) for _ in range(rng.randint(1, 4))) + "<eos>", 0.5),
    ]


if __name__ == "__main__":
    source = random.Random(sys.argv[2] if len(sys.argv) > 2 else 0)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print("".join(text for text, _ in document(source)), end="\n\n")
