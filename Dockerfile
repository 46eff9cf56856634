# syntax=docker/dockerfile:1
# The trainer's image: verl with vLLM on CUDA 13, and this package. `launcher image` prints the command that builds it.
#
# UNBUILT: linted, but never built nor run. The Python packages resolve together (constraints-image.txt); that
# flash-attn compiles against them, and that all of it runs on a GPU, nobody has seen yet.
#
# Kubernetes' `command:` replaces the ENTRYPOINT below, and with it tini. A process that is PID 1 ignores SIGTERM until
# it has installed a handler, so job specs give the trainer another PID (`shareProcessNamespace: true`), or tini.

# `devel`, for the final stage too: Triton and FlashInfer compile kernels when they first run, with gcc and nvcc.
# To pin it: --build-arg CUDA_IMAGE=nvidia/cuda@sha256:...
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${CUDA_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# wget: KubeRay's health checks. The ibverbs: NCCL over InfiniBand. Versions are the base image's release's.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential ca-certificates ibverbs-providers libibverbs1 libnuma1 librdmacm1 \
        python3 python3-dev python3-venv tini wget \
    && rm -rf /var/lib/apt/lists/*

FROM base AS packages
ARG UV_VERSION=0.13.9
RUN python3 -m venv /opt/infl /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir "uv==${UV_VERSION}"
ENV PATH=/opt/infl/bin:/opt/uv/bin:${PATH} \
    VIRTUAL_ENV=/opt/infl \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1
WORKDIR /build
COPY constraints-image.in constraints-image.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --requirement constraints-image.in --constraint constraints-image.txt
# Compiled here, for the GPUs named; an hour on 8 cores. MAX_JOBS: about 4 GB of memory each.
ARG FLASH_ATTN_VERSION=2.8.3
ARG FLASH_ATTN_CUDA_ARCHS=90
ARG MAX_JOBS=8
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --constraint constraints-image.txt ninja packaging psutil setuptools wheel \
    && FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS}" MAX_JOBS="${MAX_JOBS}" \
        uv pip install --no-build-isolation --constraint constraints-image.txt "flash-attn==${FLASH_ATTN_VERSION}"

# This package last: a changed line of it costs none of the above.
FROM packages AS installed
COPY pyproject.toml README.md LICENSE ./
COPY jobs jobs
COPY templates templates
COPY influence influence
COPY launcher launcher
ARG VERSION
# The label must not say what the package does not.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv build --wheel --out-dir dist . \
    && uv pip install --constraint constraints-image.txt "influence-launcher[trainer,wandb,store] @ file://$(echo /build/dist/*.whl)" \
    && uv pip check \
    && python -c 'import sys; from importlib.metadata import version as v; a, b = v("influence-launcher"), sys.argv[1]; sys.exit(a != b and f"the package is {a}, VERSION is {b!r}")' "${VERSION}"

FROM base AS trainer
# Ubuntu's image has a user 1000 of its own.
RUN userdel --remove ubuntu \
    && groupadd --gid 1000 infl \
    && useradd --uid 1000 --gid 1000 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin infl
COPY --from=installed /opt/infl /opt/infl
# Nothing outside /tmp, /dev/shm and the run directory is written, so the root file system may be read-only.
ENV PATH=/opt/infl/bin:${PATH} \
    VIRTUAL_ENV=/opt/infl \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    XDG_CONFIG_HOME=/tmp/config \
    XDG_DATA_HOME=/tmp/data \
    USER=infl \
    PYTHONUNBUFFERED=1
ARG VERSION
ARG REVISION=unknown
LABEL org.opencontainers.image.title="influence-launcher trainer" \
      org.opencontainers.image.description="verl with vLLM, and the tracer of every response token's influence" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /tmp
USER 1000:1000
ENTRYPOINT ["/usr/bin/tini", "--", "python", "-m", "influence.train"]
