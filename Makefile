# make demo   a video from the embedded model: environment, install, generate
# make test   all tests
# make lint   ruff and pyright
#
# Everything goes into .venv; the system's Python is only used to make it. A later run uses the environment again and
# installs anew only when pyproject.toml has changed.

PYTHON ?= python3
# A build for CPU alone is smaller: `make .venv/bin/python`, then put it there with .venv/bin/pip before the first test.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PROMPT := a red circle moves right

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	@mkdir -p demo
	$(BIN)/streamt1 generate "$(PROMPT)" --out demo/video.mp4 --overwrite

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and "$(PYTHON) is Python %d.%d, expected 3.11 to 3.13: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

# PyTorch first: what is installed then is what the tests' other packages are content with.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/.core
