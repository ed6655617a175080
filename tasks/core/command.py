"""Command line of a stage, made from its function: `python -m tasks.<stage>.run CONFIG.json --input DIR --out DIR`.

    def fine_tune(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report: ...

    if __name__ == "__main__":
        command(fine_tune)

Every parameter but `config`, `out` and `job` is an input and becomes an option: `Path` or `ModelDir`
(`--base DIR[+ADAPTER]`), either of them `| None` where it may be missing, or `dict[str, ModelDir]`
(`--models NAME=DIR`, repeated). The output directory gets the stage's files, `provenance.json`, and `report.json`
last: its presence says that the output is complete. Exit codes are those of `tasks.core.errors`; the error's message is
in `<work>/error.json` for the parent.

In several processes (`tasks.core.launch`) each sees one GPU, and only process 0 writes the output directory.
"""

import argparse
import errno
import faulthandler
import inspect
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.core.errors import BadConfig, BadData, DeviceLost, NoSpace, OutOfMemory, StageError
from tasks.core.gpu_selection import restart_on_selected_gpu
from tasks.core.job import Job
from tasks.core.model_files import find_defect
from tasks.core.parent_process import die_with_parent, name_process
from tasks.core.plain_text import visible
from tasks.core.provenance import provenance
from tasks.core.refs import Fact, ModelDir


class Report(BaseModel):
    """Result of a stage's run, written to `report.json`.

    `facts` go into the ref (few, small, stable); `metrics` are final numbers for MLflow; `warnings` are sentences
    for a person; `details` is everything else, JSON.
    """

    model_config = ConfigDict(extra="forbid")

    facts: dict[str, Fact] = {}
    metrics: dict[str, float] = {}
    warnings: list[str] = []
    details: dict[str, Any] = {}


def command(stage: Callable[..., Report], argv: list[str] | None = None) -> None:
    """Runs `stage` as the process's main program and exits with the code of what happened."""
    restart_on_selected_gpu()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # sent by the parent when the command stalls
    die_with_parent()
    name_process("stage:" + Path(inspect.getfile(stage)).parent.name)
    hints = get_type_hints(stage)
    arguments = vars(_parser(stage, hints).parse_args(argv))
    out, work = Path(arguments.pop("out")), arguments.pop("work")
    work = Path(work) if work else out.with_name(out.name + ".work")
    rank = int(os.environ.get("RANK", "0"))  # among those that torchrun started
    job = Job(work, memory_level=arguments.pop("memory_level"), bar=sys.stderr.isatty(), rank=rank)
    if rank == 0:
        (work / "error.json").unlink(missing_ok=True)
    else:
        out = work / f"out-{rank}"
    job.catch_sigterm()
    start = time.time()
    try:
        config = _config(hints["config"], Path(arguments.pop("config")))
        inputs = {name: _input(hints[name], value) for name, value in arguments.items() if value is not None}
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        report = stage(config=config, out=out, job=job, **inputs)
        _write_json(out / "provenance.json", provenance(config, inputs))
        seconds = {"seconds": round(time.time() - start, 3)}
        _write_json(out / "report.json", {"stage": stage.__name__, **seconds, **report.model_dump()})
        if rank == 0:
            _print_summary(report, out)
    except BaseException as error:
        failure = _as_stage_error(error)
        if failure is None:
            raise
        traceback.print_exc()
        if rank == 0 or not (work / "error.json").exists():  # of several processes, the first one's
            _write_json(work / "error.json", {"code": failure.exit_code, "message": visible(str(failure))})
        sys.stderr.flush()
        if rank or "TORCHELASTIC_RUN_ID" in os.environ:  # the others may wait in a collective: no slow clean-up
            os._exit(failure.exit_code)
        sys.exit(failure.exit_code)


def _print_summary(report: Report, out: Path) -> None:
    """Prints warnings, output directory and facts to stderr: the result for a person who ran the command by hand."""
    for warning in report.warnings:
        print(f"warning: {visible(warning)}", file=sys.stderr)
    facts = (f"{name} {value}" for name, value in report.facts.items())
    print(visible("; ".join([str(out), *facts])), file=sys.stderr)


def _parser(stage: Callable[..., Report], hints: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=inspect.getdoc(stage))
    parser.add_argument("config", help="the stage's config as JSON")
    parser.add_argument("--out", required=True, help="output directory, made anew; report.json is written last")
    parser.add_argument("--work", help="scratch directory, kept for resuming (default: OUT.work)")
    parser.add_argument("--memory-level", type=int, default=0, help="out-of-memory retries so far")
    for name, parameter in inspect.signature(stage).parameters.items():
        if name in ("config", "out", "job"):
            continue
        is_mapping = _is_mapping(hints[name])
        parser.add_argument(
            "--" + name.replace("_", "-"),
            action="append" if is_mapping else "store",
            required=parameter.default is inspect.Parameter.empty,
            metavar="NAME=DIR" if is_mapping else "DIR",
        )
    return parser


def _config(model: type[BaseModel], path: Path) -> BaseModel:
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadConfig(f"{path}: {error}") from error


def _input(hint: Any, value: Any) -> Any:
    if _is_mapping(hint):
        pairs = (text.partition("=") for text in value)
        return {name: _model(directory) for name, _, directory in pairs}
    if ModelDir in (hint, *get_args(hint)):
        return _model(value)
    return Path(value)


def _model(text: str) -> ModelDir:
    model = ModelDir.parse(text)
    for directory in model:
        if directory and (defect := find_defect(directory)):
            raise BadConfig(defect)
    return model


def _is_mapping(hint: Any) -> bool:
    return any(get_origin(part) is dict for part in (hint, *get_args(hint)))


def _as_stage_error(error: BaseException) -> StageError | None:
    """`error` as a typed stage error; None for a programming error, which exits with a traceback and code 1."""
    if isinstance(error, StageError):
        return error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without torch here
        return OutOfMemory(str(error) or "host memory ran out")
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error):
        return OutOfMemory(str(error))
    if type(error).__name__ == "AcceleratorError":
        return DeviceLost(str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left on disk: {error}. Free some, or move STILLHOUSE_HOME to a larger disk")
    if isinstance(error, FileNotFoundError):
        return BadData(str(error))
    if isinstance(error, ValueError):  # stages raise ValueError that says which value, which row, and what to do
        return BadConfig(str(error))
    return None


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
