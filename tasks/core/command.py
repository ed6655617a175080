"""Turns a stage's function into its command: `python -m tasks.<stage>.run CONFIG.json --input DIR --out DIR`.

    def fine_tune(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report: ...

    if __name__ == "__main__":
        command(fine_tune)

Every parameter but `config`, `out` and `job` is an input and becomes an option: `Path` or `ModelDir`
(`--base DIR[+ADAPTER]`), either of them `| None` where it may be missing, or `dict[str, ModelDir]`
(`--models NAME=DIR`, repeated). The output directory gets the stage's files, `provenance.json`, and `report.json`
last: its presence says that the rest is whole. Exit codes are those of `tasks.core.errors`; what went wrong is in
`<work>/error.json`, for the parent to tell.

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
from tasks.core.gpu_selection import restart_with_own_gpu
from tasks.core.job import Job
from tasks.core.model_files import fault
from tasks.core.parent_process import die_with_parent, name_process
from tasks.core.provenance import provenance
from tasks.core.refs import Fact, ModelDir


class Report(BaseModel):
    """What a stage says of its work. Becomes `report.json`.

    `facts` go into the ref (few, small, stable); `metrics` are final numbers for MLflow; `warnings` are sentences
    for a person; `details` is everything else, JSON.
    """

    model_config = ConfigDict(extra="forbid")

    facts: dict[str, Fact] = {}
    metrics: dict[str, float] = {}
    warnings: list[str] = []
    details: dict[str, Any] = {}


def command(stage: Callable[..., Report], argv: list[str] | None = None) -> None:
    """Runs `stage` as the process's main program and exits with what happened."""
    restart_with_own_gpu()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the stall watchdog asks for the stacks
    die_with_parent()
    name_process("stage:" + Path(inspect.getfile(stage)).parent.name)
    hints = get_type_hints(stage)
    arguments = vars(_parser(stage, hints).parse_args(argv))
    out, work = Path(arguments.pop("out")), arguments.pop("work")
    work = Path(work) if work else out.with_name(out.name + ".work")
    rank = int(os.environ.get("RANK", "0"))  # among those that torchrun started
    job = Job(work, rung=arguments.pop("rung"), bar=sys.stderr.isatty(), rank=rank)
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
            _say(report, out)
    except BaseException as error:
        known = _known(error)
        if known is None:
            raise
        traceback.print_exc()
        if rank == 0 or not (work / "error.json").exists():  # of several processes, what the first one says
            _write_json(work / "error.json", {"code": known.exit_code, "message": str(known)})
        sys.stderr.flush()
        if rank or "TORCHELASTIC_RUN_ID" in os.environ:  # the others may wait for us in a collective: no long goodbye
            os._exit(known.exit_code)
        sys.exit(known.exit_code)


def _say(report: Report, out: Path) -> None:
    """The end of the log: for a person who started the command by hand it is all that is shown."""
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("; ".join([str(out), *(f"{name} {value}" for name, value in report.facts.items())]), file=sys.stderr)


def _parser(stage: Callable[..., Report], hints: dict[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=inspect.getdoc(stage))
    parser.add_argument("config", help="the stage's config as JSON")
    parser.add_argument("--out", required=True, help="output directory, made anew; report.json is written last")
    parser.add_argument("--work", help="scratch directory, kept for resuming (default: OUT.work)")
    parser.add_argument("--rung", type=int, default=0, help="out-of-memory retries so far")
    for name, parameter in inspect.signature(stage).parameters.items():
        if name in ("config", "out", "job"):
            continue
        many = _is_mapping(hints[name])
        parser.add_argument(
            "--" + name.replace("_", "-"),
            action="append" if many else "store",
            required=parameter.default is inspect.Parameter.empty,
            metavar="NAME=DIR" if many else "DIR",
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
        if directory and (said := fault(directory)):
            raise BadConfig(said)
    return model


def _is_mapping(hint: Any) -> bool:
    return any(get_origin(one) is dict for one in (hint, *get_args(hint)))


def _known(error: BaseException) -> StageError | None:
    """`error` as a typed stage error; None for a programmer's error, which keeps its traceback and exit code 1."""
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
