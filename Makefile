# Every target sets .venv up by itself when it is not there; nothing needs root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file client/pyproject.toml client/triward

bench: $(READY)
	$(BIN)/python -m benchmarks.compare --output benchmarks/results/$$(date +%F)-cpu-small.json

clean:
	rm -rf .venv

$(READY): constraints.txt pyproject.toml client/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./client -e '.[dev]'
	touch $@
