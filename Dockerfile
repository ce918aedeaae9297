# s2vflow in a container, as a user without rights of its own.
#   docker build -t s2vflow .                                    CPU
#   docker build -t s2vflow:cuda --build-arg TORCH=cu126 .       NVIDIA GPUs (docker run --gpus all)
#   docker run --rm -v "$PWD:/work" -v s2vflow-cache:/cache s2vflow run talk.yaml
FROM python:3.12-slim

ARG TORCH=cpu
ARG UID=1000

RUN useradd --uid "$UID" --create-home s2vflow && mkdir /work /cache && chown s2vflow /work /cache
COPY pyproject.toml README.md LICENSE /src/
COPY s2v_flow /src/s2v_flow
RUN pip install --no-cache-dir torch --index-url "https://download.pytorch.org/whl/$TORCH" \
 && pip install --no-cache-dir /src \
 && rm -r /src

USER s2vflow
ENV S2VFLOW_CACHE_DIR=/cache
WORKDIR /work
ENTRYPOINT ["s2vflow"]
