# One file, three images:
#
#   docker build -t cifar10-prediction-service:cpu .                   the service on a CPU: OpenVINO, no torch
#   docker build -t cifar10-prediction-service:cuda --target cuda .    the service on an NVIDIA GPU: torch with CUDA
#   docker build -t cifar10-prediction-service:train --target train .  the training program
#
# The first one serves with `docker run --publish 8000:8000 cifar10-prediction-service:cpu`, on a read-only root file system
# too (`--read-only --tmpfs /tmp`), and as a Space of Hugging Face (app_port: 8000 in its README, or SERVICE_PORT=7860 as its
# variable). Docker itself waits 10 s after SIGTERM; `docker stop --time 45` leaves time for a whole drain.
#
# Build arguments: BASE_IMAGE, any Debian with Python 3.11 or newer, pip and venv; TORCH_INDEX, the package index that torch
# comes from (its wheels decide between CPU and the version of CUDA); PIP_INDEX_URL and PIP_EXTRA_INDEX_URL, where the rest
# comes from when it is not PyPI. BuildKit is needed, which is Docker's default.

ARG BASE_IMAGE=python:3.13-slim-trixie

FROM ${BASE_IMAGE} AS venv
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv

# What each image installs is locked in requirements/, with hashes; `make lock` writes it anew.
FROM venv AS service-packages
COPY requirements/serve.txt /
RUN --mount=type=cache,target=/root/.cache/pip pip --python /opt/venv/bin/python install --require-hashes -r /serve.txt

# Torch first: it is by far the largest layer and changes least. On Linux, PyPI's own torch is a CUDA build;
# https://download.pytorch.org/whl/cu126 and its siblings have others: so its version is locked, not its hash.
FROM venv AS cuda-packages
ARG TORCH_INDEX=https://pypi.org/simple
COPY requirements/gpu-torch.txt /
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --index-url "${TORCH_INDEX}" -r /gpu-torch.txt
COPY requirements/gpu.txt /
RUN --mount=type=cache,target=/root/.cache/pip pip --python /opt/venv/bin/python install --require-hashes -r /gpu.txt

FROM venv AS training-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/training-torch.txt /
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --index-url "${TORCH_INDEX}" -r /training-torch.txt
COPY requirements/training.txt /
RUN --mount=type=cache,target=/root/.cache/pip pip --python /opt/venv/bin/python install --require-hashes -r /training.txt

# What every image has. User 1000 is also the one that Hugging Face runs a Space as.
# /models/model.safetensors is what is served: the package's own checkpoint, until a volume or a run folder is mounted there.
FROM ${BASE_IMAGE} AS runtime
RUN useradd --uid 1000 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin service \
 && install --directory --owner=1000 --group=1000 /data /models /runs \
 && ln -s /app/service/checkpoints/resnet18-cifar10.safetensors /models/model.safetensors
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 1000:1000

# The root file system may be read-only, so the bytecode is written here. Settings may also be flags: the health check asks the
# socket that the service listens on, whatever its address, port and TLS.
FROM runtime AS serving
ENV SERVICE_HOST=0.0.0.0 \
    SERVICE_PORT=8000 \
    SERVICE_CHECKPOINT=/models/model.safetensors
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 CMD ["python", "-I", "-S", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "service"]

FROM ${BASE_IMAGE} AS service-code
COPY service /app/service
COPY docker/healthcheck.py /app/
RUN python -m compileall -q --invalidation-mode unchecked-hash /app

FROM serving AS cuda
COPY --from=cuda-packages /opt/venv /opt/venv
COPY --from=service-code /app /app
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="CIFAR-10 prediction service, CUDA"

FROM runtime AS train
ENV MPLCONFIGDIR=/tmp
COPY --from=training-packages /opt/venv /opt/venv
COPY --from=service-code /app/service /app/service
COPY training /app/training
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "training"]
LABEL org.opencontainers.image.title="CIFAR-10 prediction service, training"

FROM serving AS cpu
COPY --from=service-packages /opt/venv /opt/venv
COPY --from=service-code /app /app
LABEL org.opencontainers.image.title="CIFAR-10 prediction service, CPU"
