"""Checks before a run: tokenizers and chat templates, the first rows' lengths, the memory plan of every training.

python -m tasks.preflight.run config.json --models teacher=DIR --models student=DIR --out DIR

Models are directories with config and tokenizer; their weights are not read. `report.json` has the checks in `details`.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module

from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report, command
from tasks.core.errors import StageError
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.data.chat_template import Example
from tasks.engine.data.tokenizers import load_tokenizer, require_same_tokens
from tasks.engine.memory.fit import fit_settings
from tasks.engine.memory.model_sizes import count_sizes
from tasks.engine.memory.teacher_memory import NO_EXTRA, ExtraMemory, live_teacher
from tasks.engine.models.model_config import read_config
from tasks.preflight import Check, PreflightConfig, State, Training
from tasks.preflight.first_rows import check_lengths, first_examples

PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def preflight(config: PreflightConfig, models: dict[str, ModelDir], out: object, job: Job) -> Report:
    """The checks, as `details["checks"]`; a failed one does not fail the command."""
    checks = [*_libraries(config), *_models(config, models)]
    return Report(details={"checks": checks})


def _libraries(config: PreflightConfig) -> Iterator[Check]:
    """Modules with native code fail at import on a machine that lacks what they were built for."""
    broken = {}
    for name in config.libraries:
        try:
            import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            broken[name] = str(error).splitlines()[0]
    if broken:
        message = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        yield Check("libraries", "fail", message, "pip install 'stillhouse[gpu]'")
    elif config.libraries:
        yield Check("libraries", "ok", f"{', '.join(config.libraries)} can be imported")


def _models(config: PreflightConfig, models: Mapping[str, ModelDir]) -> Iterator[Check]:
    tokenizers = {}
    for name, model in models.items():
        try:
            tokenizers[name] = load_tokenizer(model, config.chat_template)
        except (ValueError, OSError, StageError) as error:
            yield Check(f"tokenizer of {name}", "fail", str(error), f"{model}: copy or download its tokenizer again")
    yield from _templates(config, tokenizers)
    if config.same_tokenizer and len(tokenizers) > 1:
        yield _same_tokens(tokenizers)
    student = next(reversed(tokenizers.values()), None)
    if student is None or student.chat_template is None:
        return
    examples: list[Example] = []
    if config.rows is not None:
        try:
            examples = first_examples(config, student)
        except (ValueError, OSError, StageError) as error:
            yield Check("first rows", "fail", str(error), "correct the file, or set ingest.format")
            return
        yield from check_lengths(config, examples)
    fitting = [example for example in examples if len(example.input_ids) <= config.max_length]
    for name, training in config.trainings.items():
        if training.model in models:
            yield _memory(config, name, training, models, fitting)


def _templates(config: PreflightConfig, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> Iterator[Check]:
    for name, tokenizer in tokenizers.items():
        if tokenizer.chat_template is None:
            yield Check(
                f"chat template of {name}", "fail", "the tokenizer has none",
                "set chat_template: gemma, or take the instruction-tuned model (-it)",
            )  # fmt: skip
    templates = {tokenizer.chat_template for tokenizer in tokenizers.values()}
    if len(templates) == 1 and templates != {None}:
        yield Check("chat template", "ok", f"{config.chat_template}, one for {', '.join(tokenizers)}")
    elif None not in templates and config.same_tokenizer:
        yield Check("chat template", "warn", "teacher and student have different ones; the student's is used for both")


def _same_tokens(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> Check:
    teacher, student = list(tokenizers.values())[:2]
    try:
        require_same_tokens(teacher, student)
    except (ValueError, StageError) as error:
        return Check("tokenizers", "fail", str(error), "take a teacher and a student of one family")
    return Check("tokenizers", "ok", f"teacher and student share one of {len(student):,} pieces")


def _memory(
    config: PreflightConfig, name: str, training: Training, models: Mapping[str, ModelDir], examples: list[Example]
) -> Check:
    """The memory plan that the training will make, by its first rows; without rows by the longest that is allowed."""
    budget = training.settings.memory_gib
    gib = config.card_gib if budget == "auto" else None if budget == "off" else budget
    label = f"memory of {name}"
    if gib is None:
        return Check(label, "ok", "no CUDA device, so nothing to plan" if budget == "auto" else "memory_gib is off")
    lengths = [len(example.input_ids) for example in examples] or [config.max_length]
    labels = sum(len(example.answer_ids) for example in examples) / sum(lengths) if examples else 1.0
    extra = _extra(training, models)
    try:
        _, plan = fit_settings(
            training.settings, training.method, models[training.model], lengths, labels, gib, training.processes, extra
        )
    except StageError as error:
        state: State = "fail" if examples else "warn"  # rows that were not seen may be shorter than max_length
        return Check(label, state, str(error).split(" Set a smaller")[0], "set " + str(error).partition(" Set ")[2])
    return Check(label, "ok", f"{plan.chosen.describe()}, of {gib:.1f}")


def _extra(training: Training, models: Mapping[str, ModelDir]) -> ExtraMemory:
    """The teacher beside a student: the model, or its cached outputs with its LM head."""
    teacher = models.get("teacher")
    if training.model != "student" or teacher is None:
        return NO_EXTRA
    if training.teacher_online:
        return live_teacher(teacher, training.teacher_precision)
    sizes = count_sizes(read_config(teacher.base), training.settings, "full")
    return ExtraMemory(fixed=2.0 * sizes.head, per_label=2.0 * sizes.hidden)


if __name__ == "__main__":
    command(preflight)
