# Everything a person or a machine runs. `make serve` and `make test` set up what they need, and only that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOWEST := $(VENV)/lowest
# An unpacked CIFAR-10 if there is one, else it is downloaded to data/.
DATA ?= $(if $(wildcard data/cifar10/train),data/cifar10,cifar10)
RUN ?= $(if $(RECIPE),runs/$(RECIPE))
REQUESTS ?= 1000000
MINUTES ?= 5
SEED ?= 1

# A GPU is served by torch; a CPU by OpenVINO, which is a tenth of the download.
ACCELERATOR := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo torch)
# Empty: recipe, first weights and run folder are chosen for the data.
RECIPE ?=

.PHONY: serve test test-all test-lowest test-wheel lock check format docs lines train bench bench-quick chaos fuzz soak clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

serve: $(VENV)/.serve ## set up and serve the checkpoint in the repo on port 8000
	@exec $(BIN)/python -m service

test: $(VENV)/.dev ## set up and run the fast tests
	@exec $(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev ## run every test
	-@$(PIP) -e '.[ray]' # where there is no Ray, its tests are skipped
	@exec $(BIN)/python -m pytest

test-lowest: $(LOWEST)/.dev ## the fast tests with the lowest versions of all dependencies that pyproject.toml admits
	@exec $(LOWEST)/bin/python -m pytest -m "not slow" -p no:cacheprovider \
		-W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning # old packages warn of each other

test-wheel: $(VENV)/.dev ## build the wheel, install it in an empty environment, serve from it
	@exec $(BIN)/python -m pytest tests/test_wheel.py

check: $(VENV)/.dev ## format, lint, types, fast tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -m "not slow"

format: $(VENV)/.dev ## rewrite the code as `make check` wants it
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(VENV)/.dev ## make the tables of docs/ from the code
	@$(BIN)/python docs/tables.py

# The service's packages with hashes, for every Python and system; torch by version alone, since each index has its own builds.
EXPORT = $(BIN)/uv export --quiet --frozen --no-dev --no-emit-project --no-annotate --no-header
lock: $(VENV)/.dev ## write requirements/ anew: what `make serve` and the images install
	@$(BIN)/uv lock --upgrade $(ARGS)
	@$(EXPORT) --extra heif --extra rate-limit --extra tracing --output-file requirements/serve.txt >/dev/null
	@$(EXPORT) --extra heif --extra rate-limit --extra tracing --extra torch --prune torch --output-file requirements/gpu.txt >/dev/null
	@$(EXPORT) --extra heif --extra rate-limit --extra tracing --extra training --prune torch --prune torchvision \
		--output-file requirements/training.txt >/dev/null
	@$(EXPORT) --extra torch --no-hashes | grep '^torch==' > requirements/gpu-torch.txt
	@$(EXPORT) --extra training --no-hashes | grep -E '^torch(vision)?==' > requirements/training-torch.txt

lines: ## count the lines of code of every package
	@$(PYTHON) -m benchmarks.lines

# Not from the environment, where NAME often means the host.
NAME :=
SIZE :=
EPOCHS :=
ARGS :=
# A value as one word of the shell, and an option with it where it is set.
quoted = '$(subst ','\'',$(1))'
option = $(if $(2),$(1) $(call quoted,$(2)))

train: $(VENV)/.training ## train: make train DATA="my photos" RUN="runs/a b" NAME= RECIPE= SIZE= EPOCHS= INITIAL=checkpoint ARGS=
	@exec $(BIN)/python -m training train --data $(call quoted,$(DATA)) \
		$(call option,--recipe,$(RECIPE)) $(call option,--out,$(RUN)) $(call option,--name,$(NAME)) $(call option,--size,$(SIZE)) $(call option,--epochs,$(EPOCHS)) \
		$(call option,--initial-checkpoint,$(INITIAL)) $(ARGS)

bench: $(VENV)/.dev ## measure every target on this machine, in 25 minutes, and write the page; nothing else may run
	@$(PIP) mosec
	@$(BIN)/python -m benchmarks $(ARGS)
	@$(BIN)/python docs/tables.py

bench-quick: $(VENV)/.dev ## the rates beside mosec, in three minutes
	@$(PIP) mosec
	@exec $(BIN)/python -m benchmarks --quick $(ARGS)

chaos: $(VENV)/.dev ## do every fault to the real service under load, and say what became of every request
	@exec $(BIN)/python -m benchmarks.resilience.chaos --out benchmarks/chaos.md

fuzz: $(VENV)/.dev ## mutants of images, forms, JSON, tensors and HTTP to the real service: make fuzz MINUTES=5 SEED=1
	@exec $(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

soak: $(VENV)/.dev ## a million mixed requests, and what every process holds after them: make soak REQUESTS=10000
	@exec $(BIN)/python -m tests.fuzz --requests $(REQUESTS)

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis fuzz-failures

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

# The download is said before it begins: pip itself is quiet.
$(VENV)/.serve: $(wildcard requirements/*.txt) | $(VENV)/bin/python
	@echo 'Setting up $(VENV) to serve: downloads about $(if $(ACCELERATOR),3.1 GB (torch with CUDA),100 MB)'
	@$(if $(ACCELERATOR),$(PIP) -r requirements/gpu-torch.txt)
	@$(PIP) --require-hashes -r requirements/$(if $(ACCELERATOR),gpu,serve).txt
	@touch $@

# PyTorch's own index has builds without CUDA, a tenth of the size; where it is not reached, the usual index has the large one.
# Both versions are named: pip also looks wherever else it is configured to, and the two must be of one build.
CPU_TORCH := https://download.pytorch.org/whl/cpu
CPU_BUILDS = $(addsuffix +cpu,$(shell cat requirements/training-torch.txt))
$(VENV)/.training: pyproject.toml | $(VENV)/bin/python
	@echo 'Setting up $(VENV) to train: downloads about $(if $(ACCELERATOR),3.2 GB,500 MB, or 3.2 GB where $(CPU_TORCH) is not reached)'
	@$(if $(ACCELERATOR),:,$(filter-out --quiet,$(PIP)) --retries 1 --timeout 10 --index-url $(CPU_TORCH) $(CPU_BUILDS) || \
		echo 'No build for CPUs there: going on with the one for CUDA, 3.2 GB')
	@$(filter-out --quiet,$(PIP)) -e '.[training]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo 'Setting up $(VENV) to train, test and check: downloads up to 3.3 GB, most of it torch with CUDA'
	@$(PIP) -e '.[training,onnx,dev]'
	@touch $@ $(VENV)/.serve $(VENV)/.training

$(LOWEST)/.dev: pyproject.toml $(VENV)/.dev
	@$(BIN)/python -m venv $(LOWEST)
	@$(BIN)/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[training,onnx,dev]'
	@touch $@
