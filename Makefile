# make demo, make test, ... work from a fresh clone with nothing but Python >= 3.10: they keep a virtual environment in
# .venv and install again only when something that the installation depends on has changed.
# ARGS is passed on:  make demo ARGS="--seeds 10 --plot curves.png"      make test ARGS="-k optim"
# TORCH=2.10.0 takes that torch instead of the pinned one, in a virtual environment of its own, .venv-2.10.0.

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv$(addprefix -,$(TORCH))
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH),$(VENV)/)constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
BUILT_FROM := pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)

.PHONY: demo test fuzz mutate bench gpu lint clean

demo: $(VENV)/.demo
	$(BIN)/childtune demo $(ARGS)

# The second run takes the Triton kernels through their interpreter, on a CPU: the sources that a GPU runs, slowly.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/test_ops.py tests/test_philox.py tests/test_selection.py tests/test_fisher_linear.py \
		tests/test_optim_fuzz.py \
		-k "triton-cpu and not accuracy and not scaling" $(INTERPRETED_ARGS)

# Longer and new random histories of the optimizer, which make test takes a fixed set of.
fuzz: $(VENV)/.test
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n 2 tests/test_optim_fuzz.py $(ARGS)

# Whether the tests notice faults: a seeded sample of single faults, each against the tests that run its line.
mutate: $(VENV)/.test
	@$(PIP_INSTALL) mutmut coverage
	$(BIN)/python tests/mutate.py $(ARGS)

bench: $(VENV)/.demo
	$(BIN)/childtune bench $(ARGS)

# On a CUDA machine: tests and benchmarks with the torch that GPU_PYTHON has.
gpu:
	PYTHON=$(GPU_PYTHON) bash benchmarks/gpu.sh $(ARGS)

lint: $(VENV)/.torch
	$(PIP_INSTALL) ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-* build *.egg-info childtune_kernels/_C_*.so childtune_kernels/_build.txt .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@echo "Installing torch into $(VENV): a download of some hundred megabytes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH),sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(CONSTRAINTS))
	@$(PIP_INSTALL) torch numpy setuptools wheel ninja
	@touch $@

# torch comes first: csrc is built against it. Without a compiler the package is installed all the same, in pure Python.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch $(BUILT_FROM)
	@echo "Building and installing childtune_kernels[$*] into $(VENV): some minutes ..."
	@$(PIP_INSTALL) --no-build-isolation -e '.[$*]'
	@touch $@
