# `make` alone prints what there is. Works with GNU make 3.81 and later.

# cpu or cuda, never both in one .venv (pyproject.toml says why).
EXTRA ?= cpu
# The Python that .venv is made from: the first of these two that runs.
PYTHON ?= $(shell for p in python3.11 python3; do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
# Extra words for pytest, e.g. PYTEST_ARGS="-k params -x".
PYTEST_ARGS ?=
# Which of the tests without Azure and GPU, e.g. MARKS="not slow".
MARKS ?=
# Of several -m pytest takes the last: one in PYTEST_ARGS would let azure, gpu and page in.
ONLY = $(if $(filter -m%,$(PYTEST_ARGS)),$(error PYTEST_ARGS has -m: write MARKS="not slow" instead))\
  -m "not azure and not gpu and not page$(if $(MARKS), and ($(MARKS)))"
# `make lock UPGRADE=1` moves every pin to the newest allowed version.
UPGRADE ?=

BIN := .venv/bin
STAMP := .venv/.setup-$(EXTRA)
# Without pip's own compiling, which uses one core.
INSTALL := $(BIN)/python -m pip install -q --no-compile
# A third of .venv, by size, that nobody here imports, or in one test: not compiled in advance.
NEVER_IMPORTED := /tests/|/phonenumbers/|/transformers/models/(?!auto/|llama/|mistral/|phi3/|qwen)
LOCKS := requirements/$(EXTRA).txt requirements/azure.txt requirements/serve.txt requirements/webgpu.txt requirements/dev.txt
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# No tool that a recipe starts reports home.
export DVC_NO_ANALYTICS := 1
export ITERATIVE_DO_NOT_TRACK := 1
export OLIVE_DISABLE_TELEMETRY := 1
export ORT_DISABLE_TELEMETRY := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-fast coverage test-azure test-azureml test-lm-eval test-page azurite azurite-stop bench docs lint lock clean check-extra

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  (EXTRA=cuda for a Linux machine with an NVIDIA GPU; PYTHON=... to choose the Python)"

setup: check-extra $(STAMP) ## make .venv and install the locked packages (free the second time)

# Stops before anything is installed over the other runtime's files, or run from another folder.
check-extra:
	@made="$$(cat $(STAMP) 2>/dev/null)"; if [ -n "$$made" ] && [ "$$made" != "$(CURDIR)" ]; then \
	  echo ".venv was made for $$made, whose commands it runs: rm -rf .venv, then make setup" >&2; exit 1; \
	fi
	@case "$(EXTRA)" in \
	  cpu) other="onnxruntime_gpu onnxruntime_genai_cuda" ;; \
	  cuda) other="onnxruntime onnxruntime_genai" ;; \
	  *) echo "EXTRA must be cpu or cuda, not '$(EXTRA)'" >&2; exit 1 ;; \
	esac; \
	for name in $$other; do \
	  if ls -d .venv/lib/python*/site-packages/$$name-*.dist-info >/dev/null 2>&1; then \
	    echo "The other runtime ($$name) is in .venv: rm -rf .venv, then make setup EXTRA=$(EXTRA)" >&2; exit 1; \
	  fi; \
	done

# The cpu torch comes from PyTorch's own index where that can be reached; where
# not, pip warns and takes the same version from wherever else it finds it.
$(STAMP): pyproject.toml $(LOCKS) | check-extra
	@py=$(BIN)/python; [ -x "$$py" ] || py="$(PYTHON)"; \
	"$${py:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo "Needs Python 3.11, 3.12 or 3.13, which '$${py:-python3}' is not: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "Making .venv with $(PYTHON)"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing requirements/{$(EXTRA),azure,serve,webgpu,dev}.txt into .venv (minutes the first time)"
	@$(BIN)/python -m pip install -q "$$(sed -n 's/^\(pip==[^ ]*\).*/\1/p' requirements/dev.txt)"
	@torch="$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/$(EXTRA).txt)"; \
	if [ "$(EXTRA)" = cpu ]; then \
	  $(INSTALL) --no-deps --retries 1 --timeout 5 --extra-index-url $(TORCH_CPU_INDEX) "$$torch"; \
	else \
	  $(INSTALL) --no-deps "$$(echo "$$torch" | sed 's/==/===/')"; \
	fi
	@$(INSTALL) $(addprefix -r ,$(LOCKS))
	@$(BIN)/python -m compileall -qq -j 0 -x '$(NEVER_IMPORTED)' .venv/lib || true  # templates are no Python
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $@

repro: setup ## run the whole pipeline (dvc repro), then show its results
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro
	@$(BIN)/lab results

test: setup ## run the tests that need no Azure account and no GPU
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 2 --dist worksteal --durations 30 $(ONLY) $(PYTEST_ARGS)

test-fast: MARKS := not slow and not longest
test-fast: setup ## run the quick ones of them: no whole pipeline, none of over two seconds
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 2 --dist worksteal --durations 5 $(ONLY) $(PYTEST_ARGS)

# In a folder of its own: a pipeline that an earlier session has finished would not run, nor be counted.
coverage: setup ## run make test; print the lines of stages/ and lab/ that no test runs
	@$(BIN)/coverage erase
	@export PATH="$(CURDIR)/$(BIN):$$PATH" TMPDIR="$$(mktemp -d)"; \
	  coverage run -m pytest -n 2 --dist worksteal $(ONLY) $(PYTEST_ARGS); status=$$?; \
	  rm -rf "$$TMPDIR"; coverage combine -q && coverage report; exit $$status

test-azure: setup ## run the tests of the Blob remote and its faults, on loopback (Node.js)
	@$(BIN)/python -m lab.remote.azurite install
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 3 --dist loadfile --durations 30 tests/azure $(PYTEST_ARGS)

test-azureml: setup ## run the tests of Azure ML: jobs, models, catalogue, on loopback (Node.js)
	@$(BIN)/python -m lab.remote.azurite install
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -n 2 --maxschedchunk 1 --durations 30 tests/azureml $(PYTEST_ARGS)

test-lm-eval: setup ## install lm-evaluation-harness, and run the tests of lab benchmark
	@$(INSTALL) -r requirements/lm_eval.txt
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest --durations 10 tests/test_benchmark.py $(PYTEST_ARGS)

test-page: setup ## run the tests of lab bake's page in a browser (Node.js, chromium)
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest -m page --durations 10 tests/test_page.py $(PYTEST_ARGS)

azurite: setup ## start a Blob emulator on this machine and point DVC at it (Node.js)
	@$(BIN)/python -m lab.remote.azurite start

azurite-stop: ## stop the emulator; DVC names the real remote again
	@$(BIN)/python -m lab.remote.azurite stop

bench: setup ## measure decoding, LoRA and AWQ beside their peers, after make repro (over an hour)
	@$(BIN)/python -m pip install -q --no-deps -r benchmarks/peers.txt diskcache
	@[ -x .venv-peers/bin/python ] || $(BIN)/python -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -q --extra-index-url $(TORCH_CPU_INDEX) \
	  "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.txt)" llmcompressor==0.14.0.1 auto-round==0.15.1
	@$(BIN)/python -m benchmarks.decode
	@$(BIN)/python -m benchmarks.lora
	@$(BIN)/python -m benchmarks.rounding contest --draws 1 --peer .venv-peers/bin/python

docs: setup ## fill the figures of README and docs from metrics/ and benchmarks/results
	@$(BIN)/python -m benchmarks.figures

lint: setup ## ruff check, ruff format --check, mypy, and params.yaml against conf/
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m stages.params --strict

# One lock per extra, all agreeing on the versions they share. No hashes: torch's
# wheel is another file on every index, and pip allows hashes on all or on none.
COMPILE = $(BIN)/pip-compile -q --allow-unsafe --strip-extras --no-header --no-emit-options \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --annotation-style=line \
  $(if $(UPGRADE),--upgrade)
# $(call only,NAME): the requirements of one extra, without the project's own.
only = $(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
  print("\n".join(p["project"]["optional-dependencies"]["$(1)"]))'
# $(call tidy,NAME,SED): makes the compiled lock the same on every machine.
tidy = sed -e 's/-r -/olive-lab[$(1)]/' -e 's/-c requirements[^,]*, //g' $(2) requirements/$(1).txt > requirements/$(1).txt.tmp && \
  mv requirements/$(1).txt.tmp requirements/$(1).txt

lock: ## write requirements/*.txt from pyproject.toml (UPGRADE=1: to the newest versions)
	@[ -x $(BIN)/pip-compile ] || { echo "pip-compile is not in .venv: run make setup first" >&2; exit 1; }
	@mkdir -p requirements
	@echo "requirements/cpu.txt (a CPU torch: without its +cpu mark and without CUDA libraries)"
	@$(COMPILE) --extra cpu -o requirements/cpu.txt pyproject.toml
	@$(call tidy,cpu,-e 's/^\(torch==[0-9.]*\)+cpu/\1    /' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton==/d')
	@echo "requirements/azure.txt"
	@$(call only,azure) | $(COMPILE) -c requirements/cpu.txt -o requirements/azure.txt -
	@$(call tidy,azure)
	@echo "requirements/serve.txt"
	@$(call only,serve) | $(COMPILE) -c requirements/cpu.txt -c requirements/azure.txt -o requirements/serve.txt -
	@$(call tidy,serve)
	@echo "requirements/lm_eval.txt"
	@$(call only,lm_eval) | $(COMPILE) -c requirements/cpu.txt -c requirements/azure.txt -c requirements/serve.txt -o requirements/lm_eval.txt -
	@$(call tidy,lm_eval)
	@echo "requirements/webgpu.txt"
	@$(call only,webgpu) | $(COMPILE) -c requirements/cpu.txt -o requirements/webgpu.txt -
	@$(call tidy,webgpu)
	@echo "requirements/dev.txt"
	@$(call only,dev) | $(COMPILE) -c requirements/cpu.txt -c requirements/azure.txt -c requirements/serve.txt -o requirements/dev.txt -
	@$(call tidy,dev)
	@echo "requirements/cuda.txt (=== asks for the plain torch even where a +cpu wheel is at hand)"
	@sed -n 's/^torch==\([^ ]*\).*/torch===\1/p' requirements/cpu.txt > requirements/torch.tmp
	@$(COMPILE) --extra cuda -c requirements/cpu.txt -c requirements/torch.tmp -o requirements/cuda.txt pyproject.toml; \
	  status=$$?; rm -f requirements/torch.tmp; exit $$status
	@$(call tidy,cuda)

clean: ## remove DVC outputs and build junk; keeps .venv and the DVC cache
	rm -rf models/* models/.[!.]* metrics/raw metrics/speed data/prepared
	rm -rf build dist outputs *.egg-info .pytest_cache .ruff_cache .coverage .coverage.*
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './.dvc/*' -prune -exec rm -rf {} +
	@echo "Kept: .venv and the DVC cache (.dvc/cache), so 'make repro' brings unchanged outputs back from it."
