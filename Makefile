# make demo: the quickstart from JSONL to proven GGUF. make test: the tests. Both build .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Everything the demo leaves behind lies below .stillhouse, Prefect's database included.
STILLHOUSE_HOME ?= $(CURDIR)/.stillhouse
export PREFECT_HOME ?= $(abspath $(STILLHOUSE_HOME))/prefect
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1
export PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE ?= prefect.server.concurrency.lease_storage.filesystem

.PHONY: demo test lint prefect-ui mlflow-ui clean
demo: .venv/ready
	mkdir -p $(PREFECT_HOME)
	$(BIN)/python -m flows.pipeline deployments/presets/quickstart.yaml

# Two workers; a file's tests stay together, for they share what was expensive to make.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

prefect-ui: .venv/ready
	mkdir -p $(PREFECT_HOME)
	$(BIN)/prefect server start

mlflow-ui: .venv/ready
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///$(abspath $(STILLHOUSE_HOME))/mlflow.db --port 5000

# torch first and by its exact version: a wheel without CUDA is used where pip is set up to find one.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gpu,dev]'
	touch $@

clean:
	rm -rf .venv .venv-swift .stillhouse
