# Development of a3-sglang. A bare machine with Python 3.11, pip and make is enough: the environment and the test
# model are made on first use, in ${XDG_CACHE_HOME:-~/.cache}/a3-sglang. The browser tests need Chromium; on Debian and
# Ubuntu, root installs it with apt.

PYTHON ?= python3
ENVIRONMENT := $(PYTHON) tools/environment
MATRIX := 0.5.17 0.5.21
# A3_TEST_DTYPE=float32 make test: in another dtype than what is fast on this CPU.
# More arguments for pytest: make test PYTEST_ARGS="-k index -x"
PYTEST_ARGS ?=
# More arguments for the demo.
DEMO_ARGS ?=
# Questions for make quality, and more arguments for it: QUALITY_ARGS="--only questions"
DATA ?=
QUALITY_ARGS ?=

# PYTHONSAFEPATH keeps the clone off the import path, here and in the processes that SGLang starts: what is tested
# is the installed package, the way a user has it.
RUN_SETTINGS := PYTHONSAFEPATH=1 SGLANG_USE_CPU_ENGINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
# What pytest itself puts on the import path of the clone is appended, so that it comes after the installed package.
PYTEST := -P -m pytest tests -ra --import-mode=append
CHECKED := a3_sglang kernels tests examples benchmarks tools support

.DEFAULT_GOAL := help
.PHONY: help demo pictures test test-matrix lint docs quality bin model gemma clean-cache

help:  ## list the targets
	@grep -hE '^[a-z-]+: *##' $(firstword $(MAKEFILE_LIST)) | awk -F': *## *' '{printf "  make %-12s %s\n", $$1, $$2}'

demo:  ## see the reuse at work: the demo on a small model, on the CPU
	@$(ENVIRONMENT) plan && bin=$$($(ENVIRONMENT) bin) && model=$$($(ENVIRONMENT) model) && \
	env $(RUN_SETTINGS) "$$bin/python" -P examples/demo.py --model "$$model" $(DEMO_ARGS)

test:  ## run all tests against the installed package
	@bin=$$($(ENVIRONMENT) bin) && model=$$($(ENVIRONMENT) model) && gemma=$$($(ENVIRONMENT) gemma) && \
	triton=$$($(ENVIRONMENT) triton) && browser=$$($(ENVIRONMENT) browser) && \
	env $(RUN_SETTINGS) A3_TEST_MODEL="$$model" A3_TEST_GEMMA="$$gemma" A3_TEST_TRITON="$$triton" \
		A3_TEST_BROWSER="$$browser" \
		"$$bin/python" $(PYTEST) --durations=15 $(PYTEST_ARGS)

test-matrix:  ## run the core tests with the other supported versions of SGLang
	@model=$$($(ENVIRONMENT) model) && gemma=$$($(ENVIRONMENT) gemma) && \
	for version in $(MATRIX); do \
		echo "== SGLang $$version"; \
		bin=$$($(ENVIRONMENT) bin --sglang $$version) && \
		env $(RUN_SETTINGS) A3_TEST_MODEL="$$model" A3_TEST_GEMMA="$$gemma" \
			"$$bin/python" $(PYTEST) -m "engine and core or not engine" $(PYTEST_ARGS) || exit 1; \
	done

lint:  ## check style (ruff) and types (mypy); changes nothing
	@bin=$$($(ENVIRONMENT) bin) && \
	"$$bin/python" -P -m ruff check $(CHECKED) && \
	"$$bin/python" -P -m ruff format --check $(CHECKED) && \
	"$$bin/python" -P -m mypy -p a3_sglang

docs:  ## build the documentation as a site, in site/
	@bin=$$($(ENVIRONMENT) bin) && "$$bin/python" -P -m mkdocs build --strict

quality:  ## measure all selectors for docs/quality.md: make quality DATA=questions.json (takes hours on two cores)
	@bin=$$($(ENVIRONMENT) bin) && model=$$($(ENVIRONMENT) model) && \
	env $(RUN_SETTINGS) "$$bin/python" -P benchmarks/quality.py --model "$$model" --data "$(DATA)" $(QUALITY_ARGS)

bin:  ## print the folder with the environment's python
	@$(ENVIRONMENT) bin

model:  ## print the folder of the test model
	@$(ENVIRONMENT) model

gemma:  ## print the folder of the second test model, Gemma-3-270M (Gemma's terms of use apply)
	@$(ENVIRONMENT) gemma

pictures:  ## draw the pictures of the docs anew: explain, the RAG app, the dashboard (needs Chromium and Prometheus)
	@bin=$$($(ENVIRONMENT) bin) && model=$$($(ENVIRONMENT) model) && \
	for name in explain rag_app dashboard; do \
		env $(RUN_SETTINGS) "$$bin/python" -P tools/pictures/$$name.py --model "$$model" -o docs/$$name.png || exit 1; \
	done

clean-cache:  ## remove the environments and the test model
	@$(ENVIRONMENT) clean
