# `make` alone lists the targets. A target that needs Python first makes .venv, unless .venv is there and up to date.

RECIPE = quickstart
PROFILE =
ACCELERATE =
ARGS =
PYTHON ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := build/install.log
MOST_LINES := layer=6747 commands=5426 ground=382 doctor=856

# .venv is stale if its Python does not run, or if it was moved: console scripts and the editable install hold its path.
ifneq ($(shell $(BIN)/python -S -c 0 2>/dev/null && cat $(STAMP) 2>/dev/null),$(shell pwd -P))
STALE := stale
endif

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' Makefile) stale

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  make train RECIPE=hh-rlhf-lora PROFILE=gpu ARGS="--beta 0.3 --max_steps 100"'

install: $(STAMP) ## make .venv with pinned versions (PYTHON=python3.12 chooses the Python)

train: $(STAMP) ## train RECIPE (quickstart); PROFILE and ACCELERATE name files of recipes/; ARGS="--beta 0.3"
	@exec $(BIN)/dpo-recipes train $(RECIPE) $(if $(PROFILE),--profile $(PROFILE)) \
	  $(if $(ACCELERATE),--accelerate $(ACCELERATE)) $(ARGS)

compare: $(STAMP) ## compare DPO, rounds and PPO on RECIPE's data; ARGS="--quick", ARGS="--betas 0.05,0.1,0.3 --seeds 0,1,2"
	@exec $(BIN)/dpo-recipes compare $(RECIPE) $(if $(PROFILE),--profile $(PROFILE)) \
	  $(if $(ACCELERATE),--accelerate $(ACCELERATE)) $(ARGS)

evaluate: $(STAMP) ## compare RECIPE's run with its initial model on held-out data; ARGS="--judge A_REWARD_MODEL"
	@exec $(BIN)/dpo-recipes evaluate $(RECIPE) $(if $(PROFILE),--profile $(PROFILE)) $(ARGS)

inspect: $(STAMP) ## look at RECIPE's data before training; ARGS="--gpu 24GB --max_length 512"
	@exec $(BIN)/dpo-recipes inspect $(RECIPE) $(if $(PROFILE),--profile $(PROFILE)) $(ARGS)

doctor: $(STAMP) ## check this machine: versions, arithmetic, speed, every recipe; ARGS="--quick --out doctor.md"
	@exec $(BIN)/dpo-recipes doctor $(if $(PROFILE),--profile $(PROFILE)) $(ARGS)

# One thread for each of the WORKERS: two threads on one core are many times slower.
test test-all test-faults test-gpu: export OMP_NUM_THREADS = 1
test test-all test-faults test-gpu bench: export HF_HUB_OFFLINE = 1
test test-all test-faults test-gpu bench: export HF_HUB_DISABLE_TELEMETRY = 1
test test-all test-faults test-gpu bench: export WANDB_MODE = offline

test: $(STAMP) ## run the tests that need neither a GPU nor the network, and are fast; ARGS="-k launch" selects tests
	@exec $(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

test-all: $(STAMP) ## run the tests of `make test` and the slow tests
	@exec $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --durations 25 \
	  -m "not gpu and not network and (slow or not faults)" $(ARGS)

test-faults: $(STAMP) ## test kills, signals, full disks and bad input; ARGS="--fault-seed 7" draws other moments
	@exec $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 25 -m faults $(ARGS)

test-gpu: $(STAMP) ## run the tests that need a card; without a card each test is skipped with its reason
	@exec $(BIN)/python -m pytest -q -rs -m gpu $(ARGS)

lint: $(STAMP) ## check style, spelling and the number of lines of code of each part of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python .ci/count_lines.py dpo_recipes $(MOST_LINES)

typecheck: $(STAMP) ## check types with mypy, strict
	$(BIN)/mypy

bench: $(STAMP) ## compare speed and memory with plain TRL in one table; ARGS="--only step,ppo"
	@exec $(BIN)/python benchmarks/bench.py $(ARGS)

docs: $(STAMP) ## build the manual as a site in build/site; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo "The manual: build/site/index.html"

recipes: $(STAMP) ## list the recipes
	@exec $(BIN)/dpo-recipes list

clean: ## remove .venv and caches, but not outputs/
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend is pinned by the constraints too: it is installed first, so that no isolated build fetches another.
$(STAMP): pyproject.toml constraints.txt $(STALE)
	@mkdir -p build; : >$(LOG); \
	say() { echo "$$*" >&2; exit 1; }; \
	python=; seen=; lacks=; \
	if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; else set -- python3.13 python3.12 python3.11 python3; fi; \
	for candidate; do \
	  version=$$("$$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue; \
	  if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    seen="$$candidate is $$version"; \
	  elif ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then \
	    lacks="$$candidate"; \
	  else python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ] && [ -n "$$lacks" ]; then \
	  say "$$lacks lacks the venv module: install it (Debian, Ubuntu: apt install $$lacks-venv) or name another" \
	    "Python, 3.11 or newer: make PYTHON=/path/to/python3"; \
	elif [ -z "$$python" ]; then \
	  say "dpo-recipes needs Python 3.11 or newer ($${seen:-$(or $(PYTHON),python3) was not found}): install one, or" \
	    "name it: make PYTHON=/path/to/python3"; \
	fi; \
	fail() { \
	  reason=$$(grep -E '^([0-9T:,-]+ )?ERROR: ' $(LOG) | head -n 1 | sed -E 's/^[0-9T:,-]* ?ERROR: //'); \
	  if grep -q 'WARNING: Retrying' $(LOG); then reason="the package index cannot be reached"; fi; \
	  say "Installing into $(VENV) failed ($${reason:-$$1}); the log is $(LOG). Mend the cause and call make again."; \
	}; \
	echo "Installing pinned versions into $(VENV) with $$python $$version: a few minutes, once; log: $(LOG)"; \
	if [ -n "$(STALE)" ]; then rm -rf $(VENV); "$$python" -m venv $(VENV) >>$(LOG) 2>&1 || fail "no venv"; fi; \
	rm -f $(STAMP); \
	pip="$(BIN)/python -m pip --disable-pip-version-check --log $(LOG) install -c constraints.txt"; \
	$$pip hatchling editables 2>>$(LOG) || fail "no build backend"; \
	$$pip --no-build-isolation -e '.[dev]' 2>>$(LOG) || fail "pip gave no reason"; \
	pwd -P >$(STAMP)
