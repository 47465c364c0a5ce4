# moegrid: a YAML grid of Mixture-of-Experts experiments becomes jobs, checkpoints, evaluations and a table.
# Every target sets up what it needs by itself; a second call costs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help

GRID ?=
SCALE ?= tiny
SITE ?= local
SEEDS ?=
NODES ?=
PROCESSES ?=
STORE ?= runs
PYTHON ?= python3
ARGS ?=
# Processes of `make test`. Tests that use a lab stay in one of them; ARGS=-n0 runs all in this one.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
export MOEGRID_STORE := $(STORE)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
OPTIONS := --scale $(SCALE) --site $(SITE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(NODES),--nodes $(NODES)) \
	$(if $(PROCESSES),--processes $(PROCESSES)) $(ARGS)
EXTRA := $(if $(filter slurm,$(SITE)),slurm)$(if $(filter ray,$(SITE)),ray)
READY := $(VENV)/.ready$(if $(EXTRA),-$(EXTRA))

.PHONY: help grid plan resume status explain table logs diff compare effects paper report ui test coverage check gpu-check picture docs bench faults doctor lab-up lab-down clean setup

help:  ## explain the targets
	@echo 'moegrid: controlled experiments on Mixture-of-Experts language models'
	@echo
	@echo 'usage: make TARGET [GRID=name] [SCALE=tiny|small|large|paper] [SITE=local|slurm|ray] [SEEDS=0,1] [STORE=dir|s3://...]'
	@echo '                   [NODES=2 PROCESSES=2] [ARGS=...]   (NODES, PROCESSES: nodes, and processes a node, of every training stage)'
	@echo
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'grids:'
	@for f in grids/*.yaml; do n=$$(basename $$f .yaml); d=$$(sed -n 's/^description: *//p' $$f | head -n 1); printf '  %-24s %s\n' "$$n" "$$d"; done
	@echo
	@echo 'start with: make grid GRID=quickstart'

need-grid = @test -n "$(GRID)" || { echo 'error: no grid named; hint: make $@ GRID=quickstart (make alone lists the grids)' >&2; exit 2; }
need-two = @test -n "$(A)" -a -n "$(B)" || { echo 'error: two grids are needed; hint: make $@ A=quickstart B=finetune_freeze' >&2; exit 2; }

grid: $(READY)  ## run a grid: plan, train, evaluate, table
	$(need-grid)
	@$(BIN)/moegrid run $(GRID) $(OPTIONS)

plan: $(READY)  ## show what a run would do, and what it costs
	$(need-grid)
	@$(BIN)/moegrid plan $(GRID) $(OPTIONS)

resume: $(READY)  ## go on after an interruption or a failure
	$(need-grid)
	@$(BIN)/moegrid resume $(GRID) $(OPTIONS)

status: $(READY)  ## state of every cell
	$(need-grid)
	@$(BIN)/moegrid status $(GRID) $(OPTIONS)

explain: $(READY)  ## why cells are new, or what of them is done (GRID=grid:cell)
	$(need-grid)
	@$(BIN)/moegrid explain $(GRID) $(OPTIONS)

table: $(READY)  ## results, one row per setting and seed
	$(need-grid)
	@$(BIN)/moegrid table $(GRID) $(OPTIONS)

logs: $(READY)  ## what the newest job of a grid says (GRID=grid:cell, ARGS=-f)
	$(need-grid)
	@$(BIN)/moegrid logs $(GRID) $(OPTIONS)

diff: $(READY)  ## fields in which two grids or cells differ (A=... B=...)
	$(need-two)
	@$(BIN)/moegrid diff $(A) $(B) --scale $(SCALE) $(ARGS)

compare: $(READY)  ## results of two grids against each other (A=... B=...)
	$(need-two)
	@$(BIN)/moegrid compare $(A) $(B) $(ARGS)

effects: $(READY)  ## what each factor does, over one or several grids (GRID="a b")
	$(need-grid)
	@$(BIN)/moegrid effects $(GRID) $(ARGS)

paper: $(READY)  ## every table and figure of the papers, or what is missing for it (ARGS="--run tiny")
	@$(BIN)/moegrid paper $(ARGS)

report: $(READY)  ## write the HTML, CSV and LaTeX report
	$(need-grid)
	@$(BIN)/moegrid report $(GRID) $(OPTIONS)

ui: $(READY)  ## open the MLflow UI on this store's runs
	@$(BIN)/moegrid ui $(GRID) $(ARGS)

doctor: $(READY)  ## check store, tracker, wheels, disk, versions
	@$(BIN)/moegrid doctor --site $(SITE)

lab-up: $(VENV)/.ready-dev  ## start SLURM, Ray, S3 and MLflow on this machine (LABS="slurm s3": only these)
	@infra/lab.sh up

lab-down:  ## stop them
	@infra/lab.sh down

test: $(VENV)/.ready-dev  ## run the tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder tests $(ARGS)

coverage: $(VENV)/.ready-dev  ## run the tests and print which lines they leave out
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder tests --cov --cov-report=term $(ARGS)

faults: $(VENV)/.ready-dev  ## run the whole fault harness
	@$(BIN)/python -m pytest tests -m faults $(ARGS)

check: $(VENV)/.ready-dev  ## style, types, import rules, dead code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python infra/dead_code.py

gpu-check: $(VENV)/.ready-dev  ## what only a GPU can show, as one table to send back
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

picture: $(READY)  ## draw README's picture of a run, out of a quickstart in a new store
	@$(BIN)/python infra/terminal_picture.py docs/pictures/terminal.svg

docs: $(VENV)/.ready-dev  ## build the documentation site into build/site
	@$(BIN)/mkdocs build -q -f infra/docs.yml

bench: $(VENV)/.ready-dev  ## run the benchmarks that README quotes
	@for f in benchmarks/*.py; do echo "== $$f"; $(BIN)/python $$f || exit 1; done

setup: $(READY)  ## only install

clean:  ## remove the virtual environment and caches (never a store)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find orchestrator jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "error: Python %d.%d is not supported; hint: make PYTHON=python3.12 (3.11 to 3.13)" % sys.version_info[:2])'
	@echo 'setting up $(VENV) (first time only, a few minutes)...' >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and exactly: a looser request would fetch another build.
$(VENV)/.ready: $(VENV)/.python pyproject.toml constraints.txt
	@$(BIN)/pip install -qq -c constraints.txt torch==2.13.0
	@$(BIN)/pip install -qq -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.ready-%: $(VENV)/.ready
	@$(BIN)/pip install -qq -c constraints.txt -e '.[train,$*]'
	@touch $@
