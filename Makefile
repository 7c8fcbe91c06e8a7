# `make help` lists what there is. Everything is installed into $(VENV); nothing outside the checkout is touched.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
# PyPI's torch for Linux brings gigabytes of CUDA libraries; a machine without an NVIDIA driver takes the CPU wheel.
# `make TORCH_INDEX= ...` leaves the choice to pip's own settings.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --quiet --constraint constraints.txt
# pip would compile all modules of all packages, for longer than it installs them. Python compiles those that are imported.
# Empty, so that it also keeps them where the environment forbids that.
export PYTHONDONTWRITEBYTECODE :=
SOURCES := natten_layers natten_layers_cli examples benchmarks tests docs typings

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint style types docs suite dist test-matrix fuzz fuzz-gpu bench-check windows constraints clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

# Threads that spin while they wait crawl on cores that others use too: passive ones cost nothing there.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(VENV)/demo.stamp ## Train, sample, save and reload a small HDiT on this machine (minutes)
	$(BIN)/natten-layers-train-hdit --name $(RUN)/demo
	$(BIN)/natten-layers-sample-hdit $(RUN)/demo.safetensors --reproduce $(RUN)/demo_samples.png

# ruff first, which takes a second. The rest side by side, as pyright, the site and what is left of the suite at its end
# take one core each.
test: $(VENV)/test.stamp ## Lint, types, the site of the documentation and the whole CPU suite
	$(MAKE) style
	$(MAKE) --jobs types docs suite

lint: style types ## ruff and pyright

style: $(VENV)/test.stamp ## ruff
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/test.stamp ## pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --pythonpath $(BIN)/python

# Strict: a link that leads nowhere, or a name that the reference does not know, is an error.
docs: $(VENV)/test.stamp ## Build the site of the documentation into site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet --strict

# One process a core, so each gets one thread: more only fight over the cores. They take tests from each other's queues, as
# the longest compile for minutes. A test that hangs fails, and says where.
suite: $(VENV)/test.stamp ## The CPU suite alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --quiet \
	    -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

# The wheel is built of the source distribution, so that this one is known to be complete.
dist: $(VENV)/test.stamp ## Build wheel and sdist, check them, and try all commands in an empty environment
	rm -rf dist build
	$(PIP) build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/distribution.py dist -- --disable-pip-version-check --constraint $(CURDIR)/constraints.txt \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# An environment for each row, gigabytes large while it lasts unless CPU wheels of torch are taken.
test-matrix: $(VENV)/test.stamp ## Parts of the suite with the oldest and newest versions, and without some packages
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/matrix.py -- $(if $(TORCH_INDEX),--torch-backend cpu)

# New examples in every run; what fails prints how to draw it again. Threads of one process would only fight over the cores.
fuzz: export OMP_NUM_THREADS := 1
fuzz: EXAMPLES ?= 100
fuzz: $(VENV)/test.stamp ## Random calls, damaged files, killed commands: minutes on a CPU (EXAMPLES=1000 for longer)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --quiet \
	    -m 'hypothesis and not gpu' --examples $(EXAMPLES)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --quiet \
	    tests/test_random.py tests/test_stress.py --seeds $(EXAMPLES)
	$(BIN)/python tests/fuzz_kills.py --rounds $$(( $(EXAMPLES) / 5 )) --seed $$RANDOM

# The compiler takes nearly all of the time, on one core a process. `auto` is as many processes as cores, if the memory of
# the machine and of the GPU suffices. compute-sanitizer comes with the CUDA toolkit; under it a call takes a hundred
# times as long.
fuzz-gpu: export OMP_NUM_THREADS := 1
fuzz-gpu: SEEDS ?= 2000
fuzz-gpu: JOBS ?= auto
fuzz-gpu: $(VENV)/test.stamp ## The same calls on a GPU, from several threads and streams over memory that holds NaN (SEEDS=500, JOBS=8)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --quiet \
	    -m gpu tests/test_stress.py --seeds $(SEEDS)
	if command -v compute-sanitizer; then \
	    compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
	        $(BIN)/python -m pytest --quiet -m gpu tests/test_random.py --seeds 25; \
	else echo "no compute-sanitizer here: memory is checked by its contents alone"; fi

# The record's own flags. A row that fails ends the census with an error, and is named by the comparison, too.
bench-check: $(VENV)/test.stamp ## Fail if a row of the census is 10 % slower, beside floor and peers, than on record (GPU; ROWS=a,b for some)
	rm -f runs/census.json
	-$(BIN)/python -m benchmarks.census --jobs 14 --peers fa2,fa4 $(if $(ROWS),--rows $(ROWS)) --out runs/census.json
	$(BIN)/python -m benchmarks.regression $(if $(ROWS),--rows $(ROWS)) runs/census.json

windows: $(VENV)/demo.stamp ## Redraw the README's picture of windows
	$(BIN)/python examples/draw_windows.py docs/images/windows.png

constraints: $(VENV)/test.stamp ## Record the installed versions as the tested set
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## Remove the environment and caches; runs/ is kept
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis *.egg-info

# torch first and alone: the CPU index holds little else, and an index that cannot be reached costs retries a package.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "natten_layers needs Python 3.11 or newer; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps $(if $(TORCH_INDEX),--retries 2 --extra-index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[hdit]'
	touch $@

# natten's source package imports torch while it builds, and would compile CUDA kernels that the suite does not use.
$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[hdit,lm,test,docs]'
	CUDA_VISIBLE_DEVICES= $(PIP) --no-build-isolation --editable '.[peers]'
	touch $@
