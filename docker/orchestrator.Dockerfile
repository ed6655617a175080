# The Prefect server, the MLflow server and the deploy step. It holds no torch, and it does not build if importing the
# flow needs what only the worker has. From the repository's root:
#
#   docker build -f docker/orchestrator.Dockerfile -t stillhouse-orchestrator .

ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# MLflow's driver for PostgreSQL, which neither MLflow nor Prefect (asyncpg) brings.
ARG PSYCOPG2=2.9.13

# Dependencies in a layer of their own: without the packages pip installs only what pyproject.toml asks for.
COPY pyproject.toml constraints.txt /tmp/stillhouse/
RUN touch /tmp/stillhouse/README.md \
 && pip install --no-cache-dir --constraint /tmp/stillhouse/constraints.txt \
      /tmp/stillhouse "psycopg2-binary==${PSYCOPG2}" \
 && rm -r /tmp/stillhouse

RUN useradd --uid 10001 --no-log-init --create-home stillhouse \
 && install --directory --owner stillhouse --group stillhouse /var/lib/stillhouse

WORKDIR /app
COPY LICENSE pyproject.toml ./
COPY flows flows
COPY tasks tasks
COPY deployments deployments

# Prefect unpacks its UI into its own package unless told otherwise, which only root may, and then serves none.
ENV PREFECT_SERVER_UI_STATIC_DIRECTORY=/tmp/prefect-ui \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    STILLHOUSE_ROOT=/app \
    STILLHOUSE_HOME=/var/lib/stillhouse \
    PREFECT_HOME=/var/lib/stillhouse/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=1
USER 10001

RUN python -c "import sys, flows.pipeline; bad = {'torch', 'transformers', 'numpy', 'mlflow'} & set(sys.modules); sys.exit(f'importing the flow loads {bad}' if bad else 0)" \
 && python -c "from importlib.util import find_spec; assert not find_spec('torch'), 'the orchestrator must not have torch'"

EXPOSE 4200 5000
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]
