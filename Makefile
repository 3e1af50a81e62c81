# `make demo` and `make test` work on a fresh machine with Python (3.11 or later) and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test test-thorough lint clean

demo: $(INSTALLED)
	$(BIN)/popc demo

test: lint
	$(BIN)/pytest

# Every architecture of the zoo through Inductor, not one of each kind: takes long.
test-thorough: lint
	POPC_THOROUGH=1 $(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt data.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r data.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info
