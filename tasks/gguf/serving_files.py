"""Writes files to serve a GGUF with: `Modelfile` for Ollama, `serve.sh` for llama.cpp's server, and a `README.md`."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tasks.engine.data.chat_template import stop_token_ids
from tasks.engine.models.model_config import read_config
from tasks.gguf import GgufConfig
from tasks.gguf.conversion_plan import ConversionPlan
from tasks.gguf.ollama import turn_template

README = """# {name} ({kind}, {megabytes:.1f} MB)

{sentence}. On {rows} {what} llama.cpp with this file and the model in float32 differ by a mean KL divergence of
{mean_kl:.2g} nats a token and agree on {top1:.1%} of the most likely tokens.

## llama.cpp

    sh serve.sh --port 8080

## Ollama

    ollama create {slug} -f Modelfile
    ollama run {slug}

## From an application

Both speak OpenAI's protocol (Ollama at http://localhost:11434/v1). A JSON schema keeps answers to a form:

    from openai import OpenAI

    client = OpenAI(base_url="http://localhost:8080/v1", api_key="none")
    schema = {{"type": "object", "properties": {{"intent": {{"type": "string"}}}}, "required": ["intent"]}}
    answer = client.chat.completions.create(
        model="{slug}",
        messages=[{{"role": "user", "content": "..."}}],
        temperature=0,
        response_format={{"type": "json_schema", "json_schema": {{"name": "answer", "schema": schema}}}},
    )
    print(answer.choices[0].message.content)
"""
SERVE = """#!/bin/sh
# llama.cpp's server with this file: its own chat template, greedy answers. More options: llama-server --help
exec llama-server --model "$(dirname "$0")/model.gguf" --alias {slug} --jinja --ctx-size {context} --temp 0 "$@"
"""


def write_serving_files(
    config: GgufConfig,
    plan: ConversionPlan,
    tokenizer: PreTrainedTokenizerBase,
    model: Path,
    proof: dict[str, float],
    out: Path,
    texts: str,
) -> list[str]:
    """Writes the three files and returns warnings; `texts` describes the proof's texts, `proof` has its numbers."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in config.name.lower()).strip("-") or "model"
    template = turn_template(tokenizer)
    recipe = modelfile(config, tokenizer, model, template.to_go() if template else None)
    (out / "Modelfile").write_text(recipe, encoding="utf-8")
    (out / "serve.sh").write_text(SERVE.format(slug=slug, context=config.context))
    (out / "README.md").write_text(
        README.format(
            name=config.name, kind=plan.kind, megabytes=plan.bytes / 1e6, sentence=plan.sentence(), what=texts,
            slug=slug, rows=round(proof["rows"]), mean_kl=proof["mean_kl"], top1=proof["top1"],
        ),
        encoding="utf-8",
    )  # fmt: skip
    if template or not tokenizer.chat_template:
        return []
    return [
        "the chat template is more than turns, so the Modelfile has none and Ollama guesses one from the GGUF: try it "
        "before you rely on it, or serve the file with llama-server, which runs the template itself"
    ]


def modelfile(config: GgufConfig, tokenizer: PreTrainedTokenizerBase, model: Path, template: str | None) -> str:
    """Ollama's Modelfile: the GGUF, its chat template in Go, stop strings, and greedy decoding as in the evaluation."""
    lines = ["FROM ./model.gguf"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    ends = stop_token_ids(tokenizer, read_config(model)) if tokenizer.chat_template else []
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(ends)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {config.context}"]
    return "\n".join(lines) + "\n"
