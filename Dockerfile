# iterdpo on NVIDIA GPUs, installed as the README says: docker build -t iterdpo .
# A worker of a Docker or Kubernetes pool starts this image for each flow run; see docs/scheduling.md. By itself:
#   docker run --gpus all --ipc host -v /srv/iterdpo:/srv/iterdpo iterdpo iterdpo run configs/nightly.yaml
FROM python:3.12-slim-bookworm

# Triton and torch.compile compile kernels at the first start; bubblewrap confines programs that code_tests runs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends bubblewrap build-essential git \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/iterdpo
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY configs configs
COPY iterdpo iterdpo
COPY judges judges
COPY flows flows
RUN pip install --no-cache-dir -c constraints/gpu.txt -e '.[gpu]'

ENV PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1
WORKDIR /srv/iterdpo
