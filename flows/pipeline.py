"""JSONL in, proven GGUF out: the DAG, on one screen.

python -m flows.pipeline deployments/presets/quickstart.yaml

train, test ── ingest ──┬────────────┬──────────┬────────────┬────────────────┬─────────────┐
                        │            │          │            │                │             │
teacher base ── fine-tune ── cache ───── distil ┼── find outliers ──┐         │             │
                                            student ── merge ───────┴── GGUF (one a kind) ──┤
student base ───────────────────────────────┴── fine-tune (direct)                      evaluate ── gate ── report
"""

from typing import Any

from prefect import flow

from flows.config import PipelineConfig
from flows.report import publish, show
from flows.stages import Stages
from flows.start import start
from flows.verdict import verdict_table
from tasks.core.import_inputs import import_files, import_model
from tasks.core.refs import AnyModel, GgufRef
from tasks.distill.task import distil
from tasks.distill.teacher_cache.task import cache_teacher
from tasks.evaluate.task import evaluate
from tasks.gate.task import gate, require_passed
from tasks.gguf.task import convert
from tasks.ingest.task import ingest, show_profile
from tasks.merge.task import merge
from tasks.outliers.task import find_outliers
from tasks.teacher.task import fine_tune


@flow(name="stillhouse", validate_parameters=True, persist_result=False)
def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Checks the data, fine-tunes the teacher, distils the student, and delivers GGUF files proven in llama.cpp.

    Returns the summary that the report shows; see `flows.report.publish`. Raises GateFailed, after the report, when
    the student or a file lost more than `gate` allows.
    """
    with Stages(config) as run:
        files = run("import data", import_files, config.files)
        pinned = config.revision.get
        teacher_base = run("import teacher base", import_model, config.teacher_base, pinned(config.teacher_base))
        student_base = run("import student base", import_model, config.student_base, pinned(config.student_base))
        text = run("import text", import_files, {"text": config.text}) if config.text else None
        frequent = (
            run("import vocabulary text", import_files, {"text": config.vocabulary_text})
            if config.vocabulary_text
            else None
        )

        dataset = run("ingest", ingest, config.ingest, files, student_base)
        show_profile(dataset)
        teacher = run("teacher", fine_tune, config.teacher, teacher_base, dataset)
        teacher_cache = (
            None
            if config.student.teacher_online
            else run("teacher-cache", cache_teacher, config.student.teacher_cache, teacher, dataset)
        )
        student = run("student", distil, config.student, student_base, teacher, dataset, teacher_cache, frequent)
        direct = (
            run("direct", fine_tune, config.direct_config, student_base, dataset, "direct") if config.direct else None
        )
        bases = {"teacher-base": teacher_base, "student-base": student_base}
        audited = {**bases, "teacher": teacher, "student": student}
        outliers = run("outliers", find_outliers, config.outliers, audited, dataset)
        verdict_table(run, outliers)
        merged = run("merge", merge, config.merge, student, dataset)
        ggufs: dict[str, GgufRef] = {
            conversion.kind: run(f"gguf {conversion.kind}", convert, conversion, merged, dataset, outliers=outliers)
            for conversion in config.gguf
        }

        models: dict[str, AnyModel | None] = {
            **bases,
            "teacher": teacher,
            "direct": direct,
            "student": student,
            "merged": merged,
        }
        scores = {
            name: run(f"evaluate {name}", evaluate, config.evaluate, model, dataset, name, None, text)
            for name, model in models.items()
            if model is not None
        }
        for kind, file in ggufs.items():
            scores[kind] = run(f"evaluate {kind}", evaluate, config.evaluate, merged, dataset, kind, file, text)
        verdict = run.attempt("gate", gate, config.gate, scores)
        with_charts = {"ingest": dataset, "teacher": teacher, "student": student, "outliers": outliers}
        with_charts |= {"direct": direct} if direct else {}
        delivered = {"teacher": teacher, "student": student, "merged": merged, **ggufs}
        summary = publish(run, dataset, scores, with_charts, verdict, delivered=delivered)
        require_passed(verdict)
        return summary


if __name__ == "__main__":
    start(pipeline, PipelineConfig, show)
