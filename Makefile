# make train: a GPT on real text, in about three minutes on two CPU cores.
# make train EXTRA=cuda13: the same on a GPU (cuda: CUDA 12; tpu: a TPU).
# make test, test-fast, fuzz, verify, lint, docs, docs-test, plan-test, slurm-test,
# mutants, lock, clean: see CONTRIBUTING.md.
#
# PYTHON names the interpreter that .venv is made with, VENV another folder:
#   make test PYTHON=python3.12 VENV=.venv312
# Unless PYTHON says otherwise it is the newest of python3.13 to python3.11.

PYTHON ?= $(shell sh requirements/newest.sh)
VENV ?= .venv
WORKDIR ?= runs/tiny
# An extra of setup.cfg, which gets a stamp of its own.
EXTRA ?=
demo = $(VENV)/.demo$(EXTRA:%=-%)
# Three workers for two cores: a fifth of the time tests wait for programs that
# they started. A file's tests share fixtures and compiled programs, so one
# worker takes it.
TEST_FLAGS ?= -n 3 --dist loadfile --no-loadscope-reorder
# What `make mutants` changes, and the tests that must notice.
MUTATED ?= training/optim
NOTICED_BY ?= tests/training/optim

run = $(VENV)/bin/python
test_extras = test,demo,data,tensorboard,bleu,slurm,finetune
plan_extras = $(test_extras),plan,plan-gpu,tokamax
locked_extras = $(plan_extras),verify,lm-eval,hf,wandb,docs

.DELETE_ON_ERROR:
.PHONY: train test test-fast fuzz verify lint docs docs-test plan-test slurm-test \
  mutants lock clean
train: $(demo)
	$(run) train.py --config configs/gpt.py --workdir $(WORKDIR) \
	  --config.data.tokenizer=sotu
	$(run) eval.py --workdir $(WORKDIR) --tasks=loss,samples \
	  --prompt="My fellow citizens" --temperature=0.8

test: $(VENV)/.test
	$(run) -m pytest $(TEST_FLAGS)

test-fast: $(VENV)/.test
	$(run) -m pytest $(TEST_FLAGS) -m 'not slow'

# 2,000 random requests of the programs and of the Python API, none of which may
# end in a traceback; FUZZ_FLAGS=--hypothesis-seed=N has others.
fuzz: $(VENV)/.test
	$(run) -m pytest -m fuzz tests/fuzz_test.py $(FUZZ_FLAGS)

# Parity with PyTorch and transformers, live. One system: VERIFY_FLAGS='-k llama'.
verify: $(VENV)/.verify
	$(run) -m pytest -n 2 -m verify tests/parity tests/benchmarks \
	  tests/front_door_test.py $(VERIFY_FLAGS)

lint: $(VENV)/.test
	$(run) -m ruff check .
	$(run) -m mypy

# The documentation site, in site/: open site/index.html.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict --quiet

# Which pages the site's own search finds, in a headless Chromium.
docs-test: docs $(VENV)/.test
	$(run) -m pytest -m docs tests/site_test.py

# What compiles for TPUs and GPUs that are not there.
plan-test: $(VENV)/.plan
	$(run) -m pytest $(TEST_FLAGS) -m plan $(PLAN_FLAGS)

# A run on a real SLURM, whose daemons it starts on this machine. It
# wants root, and Debian's slurm-wlm and munge, and mostly waits.
slurm-test: $(VENV)/.test
	$(run) -m pytest -m slurm tests/tools/launch/real_slurm_test.py

# Single faults in the source, by cosmic-ray, which the tests must notice:
#   make mutants MUTATED=training/objectives/__init__.py NOTICED_BY=tests/training/objectives/losses_test.py
mutants: $(VENV)/.mutants
	@mkdir -p .cache
	@printf '%s\n' '[cosmic-ray]' 'module-path = "$(MUTATED)"' 'timeout = 600' \
	  'excluded-modules = []' \
	  'test-command = "$(run) -m pytest -x -q $(NOTICED_BY)"' \
	  '[cosmic-ray.distributor]' 'name = "local"' > .cache/mutants.toml
	$(VENV)/bin/cosmic-ray init --force .cache/mutants.toml .cache/mutants.sqlite
	$(VENV)/bin/cosmic-ray exec .cache/mutants.toml .cache/mutants.sqlite
	$(VENV)/bin/cr-report --surviving-only --show-diff .cache/mutants.sqlite

# Writes the constraints file of this Python: once with 3.11, once with 3.12.
lock: $(VENV)/.made
	$(run) -m pip install --quiet --dry-run --ignore-installed \
	  --report $(VENV)/report.json -e '.[$(locked_extras)]'
	$(run) requirements/lock.py $(VENV)/report.json $(lock)

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build site *.egg-info

# Each stamp says that the packages of some extras are in $(VENV).
version = $(shell $(run) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
lock = requirements/$(if $(filter 3.11,$(version)),py311,py312).txt
locks = requirements/py311.txt requirements/py312.txt

$(demo): extras = demo$(EXTRA:%=,%)
$(VENV)/.test: extras = $(test_extras)
$(VENV)/.plan: extras = $(plan_extras)
$(VENV)/.verify: extras = $(test_extras),verify,lm-eval
$(VENV)/.mutants: extras = $(test_extras),mutants
$(VENV)/.docs: extras = docs

$(demo) $(VENV)/.test $(VENV)/.plan $(VENV)/.verify $(VENV)/.mutants \
$(VENV)/.docs: setup.cfg $(locks) | $(VENV)/.made
	@echo "Installing archetype[$(extras)] into $(VENV) with $(lock):" \
	  "some minutes the first time."
	@$(run) -m pip install --quiet --constraint $(lock) -e '.[$(extras)]'
	@touch $@

$(VENV)/.made:
	@python=$(PYTHON); echo "Making $(VENV) with $$python"; \
	  sh requirements/venv.sh $$python $(VENV) '$(MAKECMDGOALS)'
	@touch $@

# A Python that was asked for by name must be the one that $(VENV) was made of.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(VENV)/.made),)
asked := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifneq ($(asked),$(version))
$(error $(VENV) was made with Python $(version) and PYTHON=$(PYTHON) is \
  $(asked): name another folder with VENV=DIR or remove it with 'make clean')
endif
endif
endif
