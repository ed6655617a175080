"""The console command `stillhouse`. Each command imports what it needs when it runs, so that `--help` comes at once."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

app = typer.Typer(
    name="stillhouse",
    help="Turns your own JSONL into a small model you can trust: fine-tune, distil, audit, merge, prove GGUF files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a preset.")]
Change = Annotated[
    list[str], typer.Option("--set", metavar="SETTING=VALUE", help="Change a setting (student.rank=8). Repeatable.")
]
STAGE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _start(name: str, config: str, changes: list[str]) -> None:
    from flows.start import run as run_flow

    module = import_module(f"flows.{name}")
    flow = getattr(module, name)
    run_flow(flow, get_type_hints(flow.fn)["config"], module.show, config, changes)


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="Your rows: a file, a directory with train.jsonl, hub: or s3://.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the config.")] = Path("my.yaml"),
    teacher: Annotated[str | None, typer.Option(help="Teacher's base: hub name or directory.")] = None,
    student: Annotated[str | None, typer.Option(help="Student's base: hub name or directory.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Look at your data, card and bases; write a short config."""
    from flows.init import main

    main(data, out, teacher, student, force)


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file or preset to check too.")
    ] = None,
    flow: Annotated[
        str, typer.Option(help="The flow it is for: pipeline, quantize, audit, bakeoff, ablation.")
    ] = "pipeline",
) -> None:
    """Check this machine, and a config, without training."""
    from flows.doctor import main

    main(config, flow)


@app.command()
def run(config: Config, changes: Change = []) -> None:  # noqa: B006 (typer's default for a repeated option)
    """JSONL in, proven GGUF out: the whole pipeline."""
    _start("pipeline", config, changes)


@app.command()
def quantize(config: Config, changes: Change = []) -> None:  # noqa: B006
    """Make proven GGUF files of any model."""
    _start("quantize", config, changes)


@app.command()
def audit(config: Config, changes: Change = []) -> None:  # noqa: B006
    """Say what quantization would break in models, and why."""
    _start("audit", config, changes)


@app.command()
def bakeoff(config: Config, changes: Change = []) -> None:  # noqa: B006
    """Try every quantization method on one model."""
    _start("bakeoff", config, changes)


@app.command()
def ablation(config: Config, changes: Change = []) -> None:  # noqa: B006
    """Train the student with and without the teacher, and compare."""
    _start("ablation", config, changes)


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="A run: its name below .stillhouse/reports, or MLflow's run id.")],
    run_b: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Compare two runs, score by score."""
    from flows.compare import main

    main([run_a, run_b])


@app.command()
def fetch(
    run: Annotated[str, typer.Argument(help="A name below .stillhouse/reports (latest), or MLflow's run id.")],
    name: Annotated[str | None, typer.Argument(help="What to fetch (student, Q4_K_M); without it: a list.")] = None,
    directory: Annotated[str | None, typer.Argument(help="Where to put it.")] = None,
) -> None:
    """Fetch a model or a GGUF file that a run made."""
    from flows.fetch import main

    main([argument for argument in (run, name, directory) if argument is not None])


@app.command(context_settings=STAGE_OPTIONS)
def stage(context: typer.Context, name: Annotated[str, typer.Argument(help="teacher, distill, gguf, ...")]) -> None:
    """Run one stage alone: `stillhouse stage distill --help`."""
    names = stage_names()
    if name not in names:
        sys.exit(f"stillhouse: there is no stage {name!r}; there are {', '.join(names)}")
    os.execv(sys.executable, [sys.executable, "-m", f"tasks.{name}.run", *context.args])


def stage_names() -> list[str]:
    """Stages by the folders below `tasks` that hold a `run.py`."""
    root = Path(__file__).parents[1] / "tasks"
    return sorted(".".join(path.parent.relative_to(root).parts) for path in root.rglob("run.py"))


@app.command()
def reference() -> None:
    """Write docs/configuration.md: every setting with its help."""
    from flows.reference import write

    print(write())


@app.command()
def deploy() -> None:
    """Register the deployments with the Prefect server."""
    from deployments.deploy import main

    main()


def main() -> None:
    """The console command."""
    app()


if __name__ == "__main__":
    main()
