"""JSONL in, proven GGUF out: the DAG, on one screen.

python -m flows.pipeline deployments/presets/quickstart.yaml

train, test ── ingest ──┬───────────┬──────────────┬────────────┬───────────┐
                        │           │              │            │           │
teacher base ── fine-tune ── distil ┼── outliers   │            │           │
                                │   student ── merge ── GGUF (one a kind) ──┤
student base ───────────────────┴── fine-tune (direct)                  evaluate ── report
"""

import sys
from pathlib import Path
from typing import Any

from prefect import flow

from flows.config import PipelineConfig
from flows.report import publish, show
from flows.stages import Stages
from tasks.core.errors import StageError
from tasks.core.refs import AnyModel, GgufRef
from tasks.core.take import take_files, take_model
from tasks.distill.task import distil
from tasks.evaluate.task import evaluate
from tasks.gguf.task import convert
from tasks.ingest.task import ingest
from tasks.merge.task import merge
from tasks.outliers.task import find_outliers
from tasks.teacher.task import fine_tune


@flow(name="stillhouse", validate_parameters=True, persist_result=False)
def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Checks the data, fine-tunes the teacher, distils the student, and delivers GGUF files proven in llama.cpp.

    Returns the summary that the report shows; see `flows.report.Summary`.
    """
    with Stages(config) as run:
        files = run("take data", take_files, config.files)
        teacher_base = run(
            "take teacher base", take_model, config.teacher_base, config.revision.get(config.teacher_base)
        )
        student_base = run(
            "take student base", take_model, config.student_base, config.revision.get(config.student_base)
        )

        dataset = run("ingest", ingest, config.ingest, files)
        teacher = run("teacher", fine_tune, config.teacher, teacher_base, dataset)
        student = run("student", distil, config.student, student_base, teacher, dataset)
        direct = (
            run("direct", fine_tune, config.direct_config, student_base, dataset, "direct") if config.direct else None
        )
        bases = {"teacher-base": teacher_base, "student-base": student_base}
        outliers = run("outliers", find_outliers, config.outliers, bases | {"teacher": teacher, "student": student})
        merged = run("merge", merge, config.merge, student, dataset)
        ggufs: dict[str, GgufRef] = {}
        for one in sorted(config.gguf, key=lambda one: one.kind != "BF16"):  # the others are quantized from it
            ggufs[one.kind] = run(f"gguf {one.kind}", convert, one, merged, dataset, ggufs.get("BF16"))

        models: dict[str, AnyModel | None] = {
            **bases,
            "teacher": teacher,
            "direct": direct,
            "student": student,
            "merged": merged,
        }
        scores = {
            name: run(f"evaluate {name}", evaluate, config.evaluate, model, dataset, name)
            for name, model in models.items()
            if model is not None
        }
        for kind, gguf in ggufs.items():
            scores[kind] = run(f"evaluate {kind}", evaluate, config.evaluate, merged, dataset, kind, gguf)
        shown = {
            "ingest": dataset,
            "teacher": teacher,
            "student": student,
            "outliers": outliers,
            "mistakes": scores["student"],
        }
        return publish(run, dataset, scores, shown)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flows.pipeline CONFIG.yaml   (presets: deployments/presets/)")
    try:
        show(pipeline(PipelineConfig.load(Path(sys.argv[1]))))
    except (ValueError, OSError, StageError) as error:
        sys.exit(f"stillhouse: {error}")
