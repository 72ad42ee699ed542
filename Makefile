# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What `make lock` wrote: the packages that the suite passed with.
CONSTRAINTS := .ci/constraints.txt
BIN := .venv/bin
PIP := python -m pip --quiet --disable-pip-version-check
JOBS ?= 2
# Versions that the suite runs under in full: the oldest and the newest of pyproject.toml, and those between that differ.
# 5.24 renamed the cache; 5.17 also has the older huggingface_hub and httpx.
TRANSFORMERS ?= 5.17.0 5.23.0 5.24.0

.PHONY: demo test test-long test-newest test-transformers test-gpu lock suite check bench bench-gpu native wheel sanitize-gpu peers clean

# Rebuilt only when what is asked for changes. TORCH is installed first so that a plain CPU build is used.
.venv/installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP) install "$(TORCH)"
	$(BIN)/$(PIP) install --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $@

# A fresh environment with the newest of everything that pyproject.toml allows, kept apart from .venv.
.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/$(PIP) install "$(TORCH)"
	.venv-newest/bin/$(PIP) install --editable ".[test]"
	touch $@

demo: .venv/installed
	$(BIN)/seqlib-lm demo

# One thread per worker: threads that wait for each other on shared cores cost more than they bring.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# The same suite with packages that nobody has tested yet. It comes before `make lock`.
test-newest:
	rm -f .venv-newest/installed
	$(MAKE) .venv-newest/installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(JOBS) -m "not slow"

# The rest of each environment is the newest that goes with that transformers.
.venv-transformers-%/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/$(PIP) install "$(TORCH)"
	$(@D)/bin/$(PIP) install --editable ".[test]" "transformers==$*"
	touch $@

# Every version runs, whatever an earlier one said; make test-transformers TRANSFORMERS=5.23.0 runs one.
test-transformers: $(TRANSFORMERS:%=.venv-transformers-%/installed)
	failed=; for version in $(TRANSFORMERS); do \
	  echo "transformers $$version"; \
	  OMP_NUM_THREADS=1 .venv-transformers-$$version/bin/python -m pytest -n $(JOBS) -m "not slow" || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed under transformers$$failed"; exit 1; }

# torch and what comes with it differ by build: TORCH chooses them. triton may be older, as a torch for GPUs asks for its own.
lock: .venv-newest/installed
	{ echo "# Written by make lock: what make demo and make test install, beside torch."; \
	  .venv-newest/bin/python -m pip freeze --exclude-editable | grep -vE '^(torch|nvidia-|cuda-)' | sed 's/^triton==/triton<=/'; \
	} > $(CONSTRAINTS)

test-long: .venv/installed
	$(BIN)/python -m pytest -m slow

# transformers' own test suites against our classes; fetches them, so it needs a package index. The generation suite is
# fetched from GitHub, or taken from a clone: make suite CHECKOUT=../transformers
suite: .venv/installed
	$(BIN)/python tests/suite/run.py $(if $(CHECKOUT),--checkout $(CHECKOUT)) --json docs/transformers_suite.json

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy seqlib lm lra
	$(BIN)/python -m pytest tests/test_layout.py

bench: .venv/installed
	$(BIN)/python -m seqlib.bench

# On a machine with a GPU. What has to be brought along for the peers: make peers
test-gpu: .venv/installed
	$(BIN)/python -m seqlib.native build --target cuda
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

# Accesses out of bounds, uninitialised reads, races in shared memory and bad barriers, on the small cases.
sanitize-gpu: .venv/installed
	for tool in memcheck initcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --kernel-name-exclude kns=at:: \
	    $(BIN)/python -m pytest -m gpu tests/test_gpu.py -x -k "native and (reference or steps) and not bfloat16" || exit 1; \
	done

bench-gpu: .venv/installed
	mkdir -p bench-results
	$(BIN)/python -m seqlib.bench gpu --json bench-results/gpu.json --charts bench-results/gpu

peers: .venv/installed
	$(BIN)/python -m seqlib.bench.peers

native: .venv/installed
	$(BIN)/python -m seqlib.native build

# With every instruction set in it, so that nothing is compiled where it is installed. It is put into dist.
wheel: .venv/installed
	$(BIN)/python -m seqlib.native wheel

clean:
	rm -rf .venv .venv-newest .venv-transformers-* build dist *.egg-info seqlib/_lib
