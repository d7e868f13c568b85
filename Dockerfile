# syntax=docker/dockerfile:1
# docker build --target worker -t finercut:cpu .                               a worker without a GPU
# docker build --target worker --build-arg HARDWARE=cuda -t finercut:cuda .    a worker with one
# docker build --target servers -t finercut:servers .                          MLflow and Prefect, for compose.yaml
# A package index that needs a password is given as a secret, which stays out of the layers:
#   docker build --secret id=pip.conf,src=pip.conf --target worker -t finercut:cpu .
ARG HARDWARE=cpu

FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# SHELL: DVC starts stages with it. The rest: nothing reports to its makers.
ENV SHELL=/bin/bash \
    PATH=/opt/finercut/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false
# git: DVC, and what a run records about the code. The libraries: vLLM and PyTorch on a CPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libgomp1 libnuma1 tini \
    && rm -rf /var/lib/apt/lists/*
# Code and environment belong to root: the user that runs models' code can write to its home and the workspace only.
RUN useradd --create-home --uid 10001 --shell /bin/bash finercut \
    && install --directory --owner finercut --group finercut /workspace /home/finercut/.cache \
    # A volume's root can belong to another user.
    && git config --system --add safe.directory /workspace
WORKDIR /opt/finercut
RUN python3 -m venv .venv

FROM base AS servers
COPY requirements requirements
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 requirements/install cpu servers
COPY docker docker
# By number, so that Kubernetes can see that it is not root.
USER 10001
WORKDIR /home/finercut
ENTRYPOINT ["tini", "-g", "--"]
CMD ["prefect", "version"]

FROM base AS compiler
# vLLM compiles when a model starts: PyTorch's compiler for a CPU, Triton's launchers for a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM compiler AS hardware-cpu

FROM compiler AS hardware-cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM hardware-${HARDWARE} AS worker
ARG HARDWARE
WORKDIR /opt/finercut
# The lock before the code: a change of the code installs little anew.
COPY requirements requirements
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 requirements/install "${HARDWARE}" lock
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 requirements/install "${HARDWARE}" project \
    && python -m compileall -q finercut pipelines
USER 10001
# The worker answers its own health check, and nobody else.
ENV FINERCUT_WORKSPACE=/workspace \
    HF_HOME=/home/finercut/.cache/huggingface \
    PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1
WORKDIR /workspace
VOLUME /workspace
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m CMD ["/opt/finercut/docker/healthy", "http://127.0.0.1:8080/health"]
ENTRYPOINT ["tini", "-g", "--", "/opt/finercut/docker/in-workspace"]
CMD ["prefect", "worker", "start", "--pool", "finercut", "--install-policy", "never", "--with-healthcheck"]
