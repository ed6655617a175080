"""Make the quickstart's rows: commands of a manufacturing audit and the JSON that answers them, seeded.

    python -m deployments.quickstart.data         # writes train.jsonl, validation.jsonl and test.jsonl into data/

Validation and test are held out three ways: every open entity value (ids, names, parts, places, numbers, dates) comes
from a pool that training never draws from, half of their commands use wordings that training never uses, and their
out-of-scope questions are new, some on topics training never touches. They are two draws from the same pools and share
no row: settings are picked on validation, scores are those of test.
"""

import json
import random
import re
import string
from pathlib import Path
from typing import Literal

from deployments.quickstart import out_of_scope, values, wordings

TRAIN_ROWS, TRAIN_OUT_OF_SCOPE = 1900, 330
EVALUATION_ROWS, EVALUATION_OUT_OF_SCOPE = 440, 110
MIXED = ("issue", "component", "part", "defect", "hazard", "task")
DATA_DIRECTORY = Path(__file__).parent / "data"
Split = Literal["train", "validation", "test"]
SEEDS: dict[Split, str] = {
    "train": "quickstart train", "validation": "quickstart test", "test": "quickstart test again",
}  # fmt: skip


def number(rng: random.Random, low: int, high: int, test: bool) -> int:
    """A whole number in [low, high]; n % 4 == 3 is kept for the test file."""
    return rng.choice([n for n in range(low, high + 1) if (n % 4 == 3) is test])


def pick(rng: random.Random, pool: tuple[list[str], list[str]], test: bool) -> str:
    """One value of this file's side of a (train, test) pool."""
    return rng.choice(pool[test])


def phrase(rng: random.Random, pool: tuple[list[str], list[str]], test: bool) -> str:
    """A phrase of the pool, or the beginning of one with the end of another, so that hardly any is seen twice."""
    head, tail = pick(rng, pool, test), pick(rng, pool, test)
    return head if rng.random() < 0.3 or " " not in head else f"{head.rsplit(' ', 1)[0]} {tail.rsplit(' ', 1)[-1]}"


def machine(rng: random.Random, test: bool) -> str:
    """A machine id; the prefixes of the test file's are never seen in training."""
    prefix = "".join(rng.choices(string.ascii_uppercase, k=2))
    from_list = test or rng.random() < 0.25 or prefix in values.MACHINE[1]
    return f"{pick(rng, values.MACHINE, test) if from_list else prefix}-{number(rng, 1, 999, test)}"


def date(rng: random.Random, test: bool) -> str:
    """A date as people write it; months, weekdays and years differ between the files."""
    month, day = pick(rng, values.MONTHS, test), number(rng, 1, 28, test)
    year = rng.choice(("2027", "2029") if test else ("2025", "2026", "2028"))
    week = f"{'this' if test else 'next'} {pick(rng, values.WEEKDAYS, test)}"
    return rng.choice(
        [
            f"{month} {day}",
            f"{day} {month}",
            f"{month} {day}, {year}",
            f"{day:02d}.{number(rng, 1, 12, test):02d}.{year}",
            week,
        ]
    )


def person(rng: random.Random, test: bool) -> str:
    """A name: first, last, both, or an initial and a last name."""
    first, last = pick(rng, values.FIRST, test), pick(rng, values.LAST, test)
    return rng.choice([first, last, f"{first} {last}", f"{first} {last}", f"{first[0]}. {last}"])


def measurement(rng: random.Random, test: bool) -> dict[str, str]:
    """A quantity with a value and one of its units."""
    quantity = rng.choice(list(wordings.UNITS))
    kilograms = number(rng, 1, 980, test)
    value = rng.choice([str(kilograms), f"{kilograms % 100 if kilograms % 100 else 7}.{number(rng, 1, 99, test)}"])
    return {"quantity": quantity, "value": value, "unit": rng.choice(wordings.UNITS[quantity])}


def entities(rng: random.Random, intent: str, test: bool) -> dict[str, str]:
    """Values for all entity keys of `intent`, in its key order."""
    entity_values = measurement(rng, test) if intent == "log_measurement" else {}
    if "part_number" in wordings.INTENTS[intent]:
        tail = rng.choice(["", "", rng.choice("YZ" if test else "ABCD")])
        entity_values["part_number"] = (
            f"{pick(rng, values.PART_NUMBER, test)}{number(rng, 1000, 9999, test)}{'-' + tail if tail else ''}"
        )
    draw = {
        "machine": lambda: machine(rng, test),
        "audit": lambda: (
            f"{pick(rng, values.AUDIT, test)}-{rng.choice(('2025', '2026'))[2:]}-{number(rng, 1, 999, test):03d}"
        ),
        "count": lambda: str(number(rng, 2, 60, test)),
        "date": lambda: date(rng, test),
        "inspector": lambda: person(rng, test),
        "owner": lambda: person(rng, test),
        "status": lambda: rng.choice(wordings.STATUS),
        "result": lambda: rng.choice(wordings.RESULT),
    }
    for key in wordings.INTENTS[intent]:
        if key not in entity_values:
            entity_values[key] = (
                draw[key]()
                if key in draw
                else (phrase if key in MIXED else pick)(rng, getattr(values, key.upper()), test)
            )
    return {key: entity_values[key] for key in wordings.INTENTS[intent]}


def sentence(rng: random.Random, wording: str, filled: dict[str, str]) -> str:
    """The wording with its values put in, as a sentence that may open and close politely.

    A value is copied as it stands: only a word of the wording itself is ever turned to upper case.
    """
    opener, closer = rng.choice(wordings.OPENERS), rng.choice(wordings.CLOSERS)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", wording.format(kind=rng.choice(wordings.KINDS), **filled))
    if opener and wording[0] != "{" and wording.split()[0] not in ("I",):
        text = text[0].lower() + text[1:]
    return opener + text + ("" if text.endswith("?") and closer == " It is urgent." else closer)


def answer(intent: str, filled: dict[str, str]) -> str:
    """The JSON string that the model has to give, exactly."""
    return json.dumps({"intent": intent, "entities": filled})


def command(rng: random.Random, intent: str, test: bool) -> dict[str, str]:
    """One in-scope row; in the test file every second wording is a held-out one."""
    wording = rng.choice(wordings.WORDINGS[intent][test and rng.random() < 0.5])
    filled = entities(rng, intent, test)
    return {"instruction": sentence(rng, wording, filled), "input": "", "output": answer(intent, filled)}


def off_topic(rng: random.Random, test: bool) -> dict[str, str]:
    """One out-of-scope row; in the test file every second one is on a topic that training never touches."""
    form = rng.choice(rng.choice([out_of_scope.TEST, out_of_scope.NEW]) if test else out_of_scope.TRAIN)
    text = re.sub(r"{(\w+)}", lambda slot: pick(rng, out_of_scope.FILL[slot[1]], test), form)
    opener = rng.choice(["", "", "", "", "Hello, ", "Hi team, ", "Quick one: "])
    text = opener + (text if not opener or text[:2] in ("I ",) else text[0].lower() + text[1:])
    closer = rng.choice(["", "", "", "", " Thanks."])
    return {"instruction": text + closer, "input": "", "output": answer("out_of_scope", {})}


def rows(split: Split) -> list[dict[str, str]]:
    """All rows of one file, unique by command, shuffled; the same every time."""
    rng, test = random.Random(SEEDS[split]), split != "train"
    total, off = (EVALUATION_ROWS, EVALUATION_OUT_OF_SCOPE) if test else (TRAIN_ROWS, TRAIN_OUT_OF_SCOPE)
    excluded = {row["instruction"] for row in rows("validation")} if split == "test" else set()
    unique: dict[str, dict[str, str]] = {}

    def add(row: dict[str, str]) -> None:
        if row["instruction"] not in excluded:
            unique.setdefault(row["instruction"], row)

    while len(unique) < off:
        add(off_topic(rng, test))
    intents = list(wordings.INTENTS)
    while len(unique) < total:
        add(command(rng, intents[len(unique) % len(intents)], test))
    result = list(unique.values())
    rng.shuffle(result)
    return result


def jsonl(split: Split) -> str:
    """The text of the split's file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))


def main() -> None:
    """Write the files and say how many rows they have."""
    DATA_DIRECTORY.mkdir(exist_ok=True)
    for split in SEEDS:
        (DATA_DIRECTORY / f"{split}.jsonl").write_text(jsonl(split), encoding="utf-8")
        print(f"{split}.jsonl: {len(rows(split))} rows")


if __name__ == "__main__":
    main()
