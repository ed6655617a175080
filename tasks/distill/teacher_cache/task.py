"""The Prefect task of `remember`: the teacher's states go to the store, and help whoever asks the same teacher next."""

import hashlib

from prefect import task

from tasks.core.refs import AdapterRef, AnyModel, DatasetRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.settings import Settings
from tasks.core.shell import run_stage
from tasks.core.store import open_store
from tasks.distill.teacher_cache import StatesConfig

STAGE = "distill.teacher_cache"


@task(name="remember", task_run_name="remember what the teacher says", **TASK_OPTIONS)
def remember(config: StatesConfig, teacher: AnyModel, dataset: DatasetRef) -> ReportRef:
    """What the teacher says of every answer token of the dataset, for `distil` with any loss.

    Rows that the same teacher was asked last time, of whatever dataset, are not asked again.
    """
    store = open_store(Settings().store_uri)
    base = teacher.base.digest if isinstance(teacher, AdapterRef) else ""
    asked = hashlib.sha256(
        f"{teacher.digest} {base} {config.teacher_precision} {config.clip_norms}".encode()
    ).hexdigest()
    entry = store.read_index(f"{STAGE}.last", asked)
    known = ReportRef.model_validate(entry) if entry else None
    if known is not None and not store.has(known.digest):
        known = None
    inputs, helps = {"teacher": teacher, "dataset": dataset}, {"known": known}
    made = run_stage(STAGE, config, inputs, ReportRef, "states", helps)
    if isinstance(made, ReportRef):  # and not what Prefect takes for a cached state
        store.write_index(f"{STAGE}.last", asked, made.model_dump(mode="json"))
    return made
