# The worker of the pool `stillhouse`, with the code and all that the stages need. CUDA comes with torch's wheels, so
# the base needs none and the host needs only the driver and the NVIDIA Container Toolkit. From the repository's root:
#
#   docker build -f docker/worker.Dockerfile -t stillhouse-worker --build-arg COMMIT=$(git rev-parse HEAD) .
#
# Read by the worker when it starts (docker/README.md has the table):
#   PREFECT_API_URL                   the Prefect server, such as http://prefect:4200/api; needed
#   STILLHOUSE_STORE, AWS_...         the object store; without it artifacts stay in the volume /var/lib/stillhouse
#   MLFLOW_TRACKING_URI               the MLflow server; without it SQLite in that volume
#   STILLHOUSE_GPU_SLOT               default gpu-<host name>: give the container a lasting host name
#   HF_TOKEN                          for gated base models

ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# xllamacpp and bitsandbytes link libgomp. Debian's mirrors drop superseded versions, so a pinned one stops building.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 tini \
 && rm -rf /var/lib/apt/lists/*

# The largest layer, kept while other versions change. TORCH is constraints.txt's. Wheels for another CUDA than the
# package index's: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH=2.13.0
ARG TORCH_INDEX=
# hadolint takes the index for an unpinned package.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch==${TORCH}"

# Dependencies in a layer of their own: without the packages pip installs only what pyproject.toml asks for.
COPY pyproject.toml constraints.txt /tmp/stillhouse/
RUN touch /tmp/stillhouse/README.md \
 && pip install --no-cache-dir --constraint /tmp/stillhouse/constraints.txt "/tmp/stillhouse[gpu]" \
 && rm -r /tmp/stillhouse

RUN useradd --uid 10001 --no-log-init --create-home stillhouse \
 && install --directory --owner stillhouse --group stillhouse /var/lib/stillhouse

WORKDIR /app
COPY LICENSE pyproject.toml ./
COPY flows flows
COPY tasks tasks
COPY deployments deployments

# The commit that provenance.json names, since the image has no .git.
ARG COMMIT=unknown
ENV PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    STILLHOUSE_ROOT=/app \
    STILLHOUSE_HOME=/var/lib/stillhouse \
    STILLHOUSE_COMMIT=${COMMIT} \
    PREFECT_HOME=/var/lib/stillhouse/prefect \
    HF_HOME=/var/lib/stillhouse/huggingface \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /var/lib/stillhouse
USER 10001

HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=5 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
ENTRYPOINT ["tini", "--"]
CMD ["prefect", "worker", "start", "--pool", "stillhouse", "--type", "process", "--with-healthcheck"]
