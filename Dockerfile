# The HTTP server as an ordinary user, with the library in a volume.
#
#   docker build -t klein-mcp .                                    CPU
#   docker build -t klein-mcp --build-arg TORCH=cu130 \
#     --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .       CUDA
#   docker run -p 127.0.0.1:8765:8765 -v klein:/data --name klein klein-mcp        with --gpus all for CUDA
#   docker exec klein cat /data/http-token                         what clients must send
#
# TORCH is a backend as uv names it: cpu, cu130, rocm6.4 … PyTorch brings its own CUDA libraries, so the smallest CUDA
# base is enough; Python comes with uv, so any base with glibc will do.
ARG BASE=debian:13-slim
ARG UV=0.9.9

FROM ghcr.io/astral-sh/uv:${UV} AS uv

FROM ${BASE}
ARG TORCH=cpu
ARG PYTHON=3.12
LABEL org.opencontainers.image.title="klein-mcp" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.modelcontextprotocol.server.name="io.github.klein-mcp/klein-mcp"

ENV UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    PATH=/opt/klein/bin:$PATH

COPY --from=uv /uv /usr/local/bin/uv
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine engine
COPY klein_mcp klein_mcp
COPY prompts prompts
RUN uv venv --python "${PYTHON}" /opt/klein \
 && uv pip install --no-cache --python /opt/klein --torch-backend "${TORCH}" --constraint constraints.txt . \
 && useradd --create-home --uid 10001 klein \
 && install -d -o klein -g klein /data

# Pictures, models and the engine's address; a call may open files of this folder only.
ENV KLEIN_HOME=/data \
    KLEIN_READ_ROOTS=/data \
    HF_HOME=/data/hub
VOLUME /data
WORKDIR /data
USER 10001
EXPOSE 8765
ENTRYPOINT ["klein-mcp"]
# Inside the container all addresses; whoever publishes the port decides who reaches it, and the token who comes in.
CMD ["serve", "--host", "0.0.0.0", "--port", "8765", "--allowed-host", "localhost"]
HEALTHCHECK --start-period=30s CMD ["/opt/klein/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8765/healthz', timeout=3)"]
