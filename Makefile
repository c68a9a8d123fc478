# Two commands do everything: `make demo` and `make test`. The same steps as plain pip lines are in README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test matrix lint base test-lowest clean

demo: .venv/.runtime
	@$(BIN)/truetune demo

test: .venv/.dev
	@$(BIN)/python -m pytest

# Every method on every form of base and every family, of which `make test` takes a sample: minutes.
matrix: .venv/.dev
	@$(BIN)/python -m pytest tests/matrix --whole-matrix

lint: .venv/.dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Build the embedded base again, from this interpreter's standard library: about half an hour on two cores.
base: .venv/.runtime
	$(BIN)/python tools/base_init.py .base-build
	$(BIN)/truetune pretrain --config tools/base.yaml --resume auto
	$(BIN)/python tools/base_finish.py .base-build

# The suite at the lowest versions that pyproject.toml allows. torch 2.8 comes with its CUDA packages: gigabytes.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	.venv-lowest/bin/python -m pytest

.venv/.runtime: pyproject.toml constraints.txt
	@echo "setting up .venv with what truetune needs (once; later runs start at once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt .venv/.runtime
	@echo "adding what the tests and linters need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest .base-build truetune-demo
