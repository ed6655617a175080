"""A dataset, a teacher fine-tuned on it, its cache, and a student: made once for all tests here."""

import pytest

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.distill.runs import cached
from tests.engine.rows import example_dataset
from tests.pico import pico_model


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return example_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, dataset):
    """A base trained on the dataset, and an adapter trained a little further."""
    random, base, adapter = (tmp_path_factory.mktemp(name) for name in ("random", "base", "adapter"))
    settings = dict(rank=8, learning_rate=5e-3, batch_size=8, micro_batch_size=8)
    for method, steps, start, out in [("full", 60, pico_model(random, hidden=64), base), ("lora", 5, base, adapter)]:
        config = FineTuneConfig(method=method, max_steps=steps, **settings)
        fine_tune(config, ModelDir(start), dataset, out, Job(tmp_path_factory.mktemp("work")))
    return ModelDir(base, adapter)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("student"), hidden=32, seed=1))


@pytest.fixture(scope="session")
def cache(tmp_path_factory, teacher, dataset):
    return cached(tmp_path_factory.mktemp("cache"), teacher, dataset)


@pytest.fixture(scope="session")
def cached_base(tmp_path_factory, teacher, dataset):
    """The cache of the teacher's base, without its adapter."""
    return cached(tmp_path_factory.mktemp("cached_base"), ModelDir(teacher.base), dataset)
