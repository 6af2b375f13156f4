# Every target sets up what it needs. An environment of your own: make test PYTHON=python3
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

BOOTSTRAP ?= python3
PYTHON ?= .venv/bin/python
WORKERS ?= 2
# preference pairs for the tests on real input, which are skipped without it
REAL_PAIRS ?=

# a PYTHON given by the caller is used as it is: nothing is created, nothing is installed
ifeq ($(PYTHON),.venv/bin/python)
SETUP := .venv/.ready
endif

# the tests run in parallel processes: without this each of them would start a thread per core
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PAIRS_OPTION := $(if $(REAL_PAIRS),--real_pairs="$(REAL_PAIRS)")
# TRITON_INTERPRET is read when triton is imported, so interpreter and compiler tests cannot share a process
COMPILE_TESTS := $(sort $(wildcard tests/kernels/test_kernels_compile*.py))
PYTEST := $(PYTHON) -m pytest -q

# without the pin pip takes gigabytes of CUDA packages with it
TORCH := torch==2.13.0

# what pyproject.toml allows, oldest and newest: trl-transformers
MATRIX := 1.16.0-5.17.0 1.16.0-5.24.0
MATRIX_VENVS ?= .venv-matrix
MATRIX_TESTS := tests/integrations

# processes of the GPU tests: they wait for the compiler, not for the GPU
GPU_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 14 ? 14 : n)))
# seconds after which the GPU tests are interrupted, and after which no benchmark is started
GPU_TEST_S ?= 180
GPU_BENCH_S ?= 300
# seconds of `make gpu` in which tests and benchmarks may start something; what follows takes a minute
GPU_S := 460

# vector instructions of torch, MKL, oneDNN and numpy's OpenBLAS, and threads: they set the order of
# sums. `make test` runs the machine's own; to ask a processor for more than it has kills the process
ISAS := default-SSE4_2-SSE41-Nehalem-1 avx2-AVX2-AVX2-Haswell-2
ISA_TESTS := tests/ops tests/planner $(addprefix tests/integrations/,lm_head spo trl_patch)

.PHONY: help setup demo test test-isa test-matrix trl-tests lint bench aot \
	gpu gpu-long gpu-present gpu-test gpu-bench gpu-report gpu-sanitize gpu-tune

help:
	@echo "make demo    train a small model with SPO on the CPU, about two minutes"
	@echo "make test    all tests; REAL_PAIRS=<file> adds those on real preference pairs"
	@echo "make test-isa  the numerical tests under older vector instructions and under two threads"
	@echo "make test-matrix  the trl and transformers tests with the oldest and the newest version of each"
	@echo "make trl-tests TRL_SOURCE=<checkout>  TRL's own trainer tests, unpatched and patched"
	@echo "make lint    ruff"
	@echo "make bench   benchmarks on this machine, then the report"
	@echo "make gpu     GPU tests, benchmarks, report, compute-sanitizer, in less than nine minutes"
	@echo "make gpu-long  the same with every shape and every tool, without a time limit, and tune"
	@echo "make aot     registers, spills and shared memory of every kernel, no GPU needed"
	@echo "PYTHON=...   uses that interpreter instead of making .venv"

setup: $(SETUP)

.venv/.ready: pyproject.toml
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(BOOTSTRAP) is older than Python 3.11; name another one: make BOOTSTRAP=python3.12" >&2; exit 2; }
	test -x .venv/bin/python || $(BOOTSTRAP) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip "setuptools>=77"
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	.venv/bin/python -m pip install --quiet -e ".[trl,bench,dev]"
	touch $@

demo: $(SETUP)
	$(PYTHON) -m spo_kernels.cli demo --output_dir spo-demo

test: $(SETUP)
	$(TEST_ENV) TRITON_INTERPRET=1 $(PYTEST) -p no:benchmark -n $(WORKERS) --dist worksteal \
		$(PAIRS_OPTION) --durations=15 $(addprefix --ignore=,$(COMPILE_TESTS))
ifneq ($(COMPILE_TESTS),)
	$(TEST_ENV) TRITON_INTERPRET=0 $(PYTEST) -p no:benchmark -n $(WORKERS) $(COMPILE_TESTS)
endif

test-isa: $(ISAS:%=test-isa-%)

test-isa-%: $(SETUP)
	set -- $(subst -, ,$*); ATEN_CPU_CAPABILITY=$$1 MKL_ENABLE_INSTRUCTIONS=$$2 ONEDNN_MAX_CPU_ISA=$$3 \
		OPENBLAS_CORETYPE=$$4 OMP_NUM_THREADS=$$5 MKL_NUM_THREADS=$$5 OPENBLAS_NUM_THREADS=$$5 \
		TRITON_INTERPRET=1 $(PYTEST) -p no:benchmark -n $(WORKERS) --dist worksteal $(ISA_TESTS)

# one environment per combination, about 1.5 GB each
test-matrix: $(MATRIX:%=test-matrix-%)

test-matrix-%: $(MATRIX_VENVS)/%/.ready
	TRITON_INTERPRET=1 $(TEST_ENV) $(<D)/bin/python -m pytest -q -p no:benchmark -n $(WORKERS) \
		--dist worksteal $(PAIRS_OPTION) $(MATRIX_TESTS)

$(MATRIX_VENVS)/%/.ready: pyproject.toml Makefile
	test -x $(@D)/bin/python || $(BOOTSTRAP) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(@D)/bin/python -m pip install --quiet "$(TORCH)"
	$(@D)/bin/python -m pip install --quiet -e ".[trl,dev]" \
		"trl==$(firstword $(subst -, ,$*))" "transformers==$(lastword $(subst -, ,$*))"
	touch $@

trl-tests: $(SETUP)
	@test -d "$(TRL_SOURCE)/tests" \
		|| { echo "make trl-tests needs TRL_SOURCE=<a checkout of TRL>, got '$(TRL_SOURCE)'" >&2; exit 2; }
	$(TEST_ENV) $(PYTHON) -m tests.helpers.trl_own_tests $(TRL_SOURCE) $(TRL_FILES)

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(SETUP)
	$(PYTEST) benchmarks --ignore=benchmarks/sparse --benchmark-only
	$(PYTHON) -m benchmarks.report

# the stages in order of value; a red one does not keep the later ones from running, each can be
# started alone. What a stage ran out of time for goes on when it is started again: compiled kernels
# stay in triton's cache, finished benchmarks in the result file
gpu: gpu-present
	@failed=0; run="$(MAKE) --no-print-directory -o gpu-present"; \
	$$run gpu-test || failed=1; \
	$$run gpu-bench GPU_BENCH_S=$$(($(GPU_S) - SECONDS)) || failed=1; \
	$$run gpu-report || failed=1; \
	$$run gpu-sanitize || failed=1; \
	exit $$failed

gpu-long: gpu-present
	@failed=0; run="$(MAKE) --no-print-directory -o gpu-present"; \
	$$run gpu-test GPU_TEST_S=3600 || failed=1; \
	$$run gpu-bench LONG=--long || failed=1; \
	$$run gpu-report || failed=1; \
	$$run gpu-sanitize GPU_TOOLS="memcheck initcheck racecheck" GPU_TOOL_S=1800 || failed=1; \
	$$run gpu-tune || failed=1; \
	exit $$failed

gpu-present: $(SETUP)
	@$(PYTHON) -c 'import sys, torch; sys.exit(not (torch.version.cuda and torch.cuda.is_available()))' \
		|| { echo "make gpu needs an NVIDIA GPU and a torch built for CUDA; $(PYTHON) sees none." >&2; exit 2; }

# one compile process in each test process, or they would be hundreds. What times the GPU comes last,
# when the others are gone
gpu-test: GPU_PYTEST = TRITON_INTERPRET=0 TORCHINDUCTOR_COMPILE_THREADS=1 \
	timeout --signal=INT --kill-after=20 $(GPU_TEST_S) $(PYTEST) -p no:benchmark -rs
gpu-test: gpu-present
	@workers="-n $(GPU_WORKERS) --dist worksteal"; code=0; \
	$(PYTHON) -c 'import hypothesis, pytest' \
		|| { echo "the GPU tests need pytest and hypothesis" >&2; exit 2; }; \
	$(PYTHON) -c 'import xdist' 2>/dev/null \
		|| { workers=; echo "pytest-xdist is not installed: one process, minutes of compiling"; }; \
	$(TEST_ENV) $(GPU_PYTEST) -m "gpu and not soak and not alone" --durations=10 \
		--continue-on-collection-errors $$workers || code=$$?; \
	test $$code -ne 124 || echo "out of time after $(GPU_TEST_S) s: run make gpu-test again"; \
	$(GPU_PYTEST) -m "gpu and alone" $$(grep -rl --include="test_*.py" mark.alone tests) || code=$$?; \
	exit $$code

gpu-bench: gpu-present
	TRITON_INTERPRET=0 $(PYTHON) -m benchmarks.gpu --seconds $(GPU_BENCH_S) $(LONG)

GPU_TOOLS ?= memcheck
GPU_TOOL_S ?= 60

gpu-sanitize: gpu-present
	TRITON_INTERPRET=0 $(PYTHON) -m benchmarks.sanitize --tools $(GPU_TOOLS) --seconds $(GPU_TOOL_S)

# prints the planner's rates, the raced tiles and both engines of the head's gradient
gpu-tune: gpu-present
	TRITON_INTERPRET=0 $(PYTHON) -m spo_kernels.cli tune --device cuda

gpu-report: $(SETUP)
	$(PYTHON) -m benchmarks.report

aot: $(SETUP)
	TRITON_INTERPRET=0 $(PYTHON) -m spo_kernels.cli aot
