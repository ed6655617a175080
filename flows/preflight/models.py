"""The base models: directories that are complete, or names on the hub that can be read, with their small files."""

from collections.abc import Iterator
from pathlib import Path

from flows.flow_config import FlowConfig
from tasks.core.model_files import find_defect
from tasks.preflight import Check

# Config, tokenizer and templates: what the checks read. Weights come with the run.
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
               "chat_template*", "preprocessor_config.json", "processor_config.json"]  # fmt: skip


def base_models(config: FlowConfig) -> dict[str, str]:
    """The run's models by their part in it: teacher and student, the model, or an audit's models by their names."""
    fields = {"teacher": "teacher_base", "student": "student_base", "model": "model"}
    sources = {part: getattr(config, field) for part, field in fields.items() if hasattr(config, field)}
    return sources or dict(getattr(config, "models", {}))


def pinned_revision(config: FlowConfig, source: str) -> str | None:
    """The revision that the config pins for a model."""
    revision = getattr(config, "revision", None)
    pinned: str | None = revision.get(source) if isinstance(revision, dict) else revision
    return pinned


def check_pins(config: FlowConfig) -> Iterator[Check]:
    """A pinned revision of a directory does nothing."""
    for source in dict.fromkeys(base_models(config).values()):
        if pinned_revision(config, source) and Path(source).expanduser().is_dir():
            yield Check(
                "revision", "warn", f"{source} is a directory, so its pinned revision does nothing", "remove it"
            )


def check_models(config: FlowConfig) -> tuple[dict[str, Path], list[Check]]:
    """Directories with at least the small files, by the model's part in the run, and the checks."""
    directories: dict[str, Path] = {}
    checks = []
    for part, source in base_models(config).items():
        path = Path(source).expanduser().absolute()
        result = _local(source, path) if path.exists() else _on_hub(source, pinned_revision(config, source))
        if isinstance(result, Path):
            directories[part] = result
            checks.append(Check(f"model {part}", "ok", f"{source} {'is complete' if path.exists() else 'can be read'}"))
        else:
            checks.append(result._replace(name=f"model {part}"))
    return directories, checks


def _local(source: str, path: Path) -> Path | Check:
    if path.is_file():
        return Check(
            "", "fail", f"{source} is a file", "give the directory with config.json, tokenizer and safetensors"
        )
    for pattern in ("config.json", "*.safetensors"):
        if not any(path.glob(pattern)):
            return Check("", "fail", f"{source} holds no {pattern}", "give a model in Hugging Face's layout")
    defect = find_defect(path)
    return Check("", "fail", defect, "copy or download it again") if defect else path


def _on_hub(source: str, revision: str | None) -> Path | Check:
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415  (slow to import, rarely needed)

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=SMALL_FILES))
    except errors.GatedRepoError:
        return Check("", "fail", f"{source} is gated", "accept its licence on the hub and set HF_TOKEN")
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        path = Path(source).absolute()
        message = f"{source} is neither a directory ({path}) nor on the hub: {str(error).splitlines()[0]}"
        return Check("", "fail", message, "correct the name, or set HF_TOKEN for a private model")
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        message = f"{source} is no directory here, and the hub does not answer: {str(error).splitlines()[0]}"
        return Check("", "fail", message, "connect to the hub, or give a local directory")
