# `make demo` and `make test` work on a fresh machine with Python (3.11 or later) and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
QUICK := $(addprefix tests/,test_imports.py test_structure.py test_compat.py test_config.py runtime/test_mirror.py \
	analysis/test_regions.py analysis/test_mutation.py analysis/test_tokens.py ops/test_measure.py \
	ops/test_pages.py ops/test_ops.py passes/test_pack_weights.py passes/test_measure_units.py)

.PHONY: demo test quick test-thorough asan soak docs lint hooks clean

demo: $(INSTALLED)
	$(BIN)/popc demo

test: lint
	$(BIN)/pytest

# What compiles next to nothing, for while one works: under a minute.
quick: lint
	$(BIN)/pytest $(QUICK)

# Every architecture of the zoo, and tens of thousands of examples of hypothesis: takes hours.
test-thorough: lint
	POPC_THOROUGH=1 $(BIN)/pytest

# The C++ kernels, built with AddressSanitizer in a cache of their own, under all that tests them.
asan: $(INSTALLED)
	CXX=$(CURDIR)/tests/helpers/asan-c++ TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/asan OMP_NUM_THREADS=2 \
	ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(tests/helpers/asan-c++ -print-file-name=libasan.so) $$(tests/helpers/asan-c++ -print-file-name=libstdc++.so)" \
	$(BIN)/pytest -n0 -s tests/ops/test_native.py tests/ops/test_attend.py tests/ops/test_fuzz.py \
	tests/ops/test_threshold.py tests/ops/test_measure.py tests/ops/test_graded.py \
	tests/ops/test_quantize.py tests/ops/test_gather_quantized.py -k 'not portable and not other_vector'

# 20,000 tokens over changing prompts: tokens, memory and speed must not drift.
soak: $(INSTALLED)
	$(BIN)/python -m tests.soak

# The pages of docs/, into build/site. Once the extra is installed, nothing is fetched.
docs: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Before each commit, what `make lint` runs. Wants pre-commit, which `make test` does without.
hooks: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check pre-commit
	$(BIN)/pre-commit install

$(INSTALLED): pyproject.toml constraints.txt data.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r data.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info
