"""The Prefect task of the teacher cache: stored as an artifact, and reused for the same teacher's next dataset."""

import hashlib

from prefect import task

from tasks.core.refs import AdapterRef, AnyModel, DatasetRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.settings import Settings
from tasks.core.shell import run_stage
from tasks.core.store import open_store
from tasks.distill.teacher_cache import TeacherCacheConfig

STAGE = "distill.teacher_cache"


@task(name="cache-teacher", task_run_name="cache the teacher's hidden states", **TASK_OPTIONS)
def cache_teacher(config: TeacherCacheConfig, teacher: AnyModel, dataset: DatasetRef) -> ReportRef:
    """The teacher's hidden states (or top-k logits) of every answer token of the dataset, for `distil` with any loss.

    Rows in the same teacher's latest cache, of whatever dataset, are copied from there.
    """
    store = open_store(Settings().store_uri)
    base = teacher.base.digest if isinstance(teacher, AdapterRef) else ""
    teacher_digest = hashlib.sha256(
        f"{teacher.digest} {base} {config.teacher_precision} {config.clip_norms}".encode()
    ).hexdigest()
    entry = store.read_index(f"{STAGE}.last", teacher_digest)
    previous = ReportRef.model_validate(entry) if entry else None
    if previous is not None and not store.has(previous.digest):
        previous = None
    inputs, unkeyed = {"teacher": teacher, "dataset": dataset}, {"previous": previous}
    cache = run_stage(STAGE, config, inputs, ReportRef, "teacher-cache", unkeyed)
    if isinstance(cache, ReportRef):  # and not what Prefect takes for a cached state
        store.write_index(f"{STAGE}.last", teacher_digest, cache.model_dump(mode="json"))
    return cache
