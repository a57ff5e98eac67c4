# mptq in an image, for a CPU or for CUDA:
#     docker build --tag mptq .
#     docker build --tag mptq-cuda --build-arg TORCH=cu130 .
#     docker run --rm --gpus all --volume "$PWD:/work" mptq-cuda quantize --recipe fp8-blockwise ckpt/
FROM python:3.12-slim

# cpu, or a CUDA version of torch's own package index, such as cu130.
ARG TORCH=cpu

RUN useradd --create-home --uid 1000 mptq

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY mptq /src/mptq

WORKDIR /src
RUN pip install --no-cache-dir --constraint constraints.txt --index-url "https://download.pytorch.org/whl/${TORCH}" torch \
    && pip install --no-cache-dir --constraint constraints.txt '.[data,report]'

USER 1000
WORKDIR /work
ENTRYPOINT ["mptq"]
CMD ["--help"]
