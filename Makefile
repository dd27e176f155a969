# Two commands a newcomer needs:  make quickstart   and   make test
# Both create the environment in .venv first (with uv if it is there, else with pip).

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
OUT ?= quickstart-report
TEST_PROCESSES ?= 2

# The mini world needs nothing from a hub; without this, libraries ask one anyway.
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup quickstart test check lint types imports format lock wheel clean FORCE

help:
	@echo "make quickstart   align, swap, evaluate and compare on the mini world; writes $(OUT)/"
	@echo "make test         run the tests"
	@echo "make check        lint, types, import contracts"
	@echo "make format       format the code"
	@echo "make lock         renew requirements.lock from pyproject.toml (needs uv)"
	@echo "make wheel        build dist/*.whl"

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; pass PYTHON=/path/to/python"; exit 2; }
	@if command -v uv >/dev/null 2>&1; then \
		set -ex; \
		uv venv --quiet --allow-existing --python "$(PYTHON)" "$(VENV)"; \
		uv pip install --quiet --compile-bytecode --python "$(BIN)/python" -r requirements.lock; \
		uv pip install --quiet --python "$(BIN)/python" --no-deps -e .; \
	else \
		set -ex; \
		"$(PYTHON)" -m venv "$(VENV)"; \
		"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock; \
		"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .; \
	fi
	@touch $@

quickstart: setup
	@$(BIN)/kuea-mllm quickstart --out "$(OUT)"

test: setup
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

check: lint types imports

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# adapters/ and recipes/ are mapped into the package when it is built; tools that read source need
# to see them in place.
build/view: setup FORCE
	@rm -rf build/view && mkdir -p build/view
	@cp -R kuea_mllm build/view/ && cp -R adapters recipes build/view/kuea_mllm/

FORCE:

types: build/view
	cd build/view && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p kuea_mllm

imports: build/view
	cd build/view && PYTHONPATH=. $(abspath $(BIN))/lint-imports --config ../../pyproject.toml

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	uv pip compile --universal --python-version 3.11 --extra dev --no-emit-index-url --no-annotate \
		--no-header --upgrade pyproject.toml -o requirements.lock

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
