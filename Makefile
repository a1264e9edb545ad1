# recllm: raw logs -> tables -> event log -> LM text -> neighbors -> CRM (stage 1) -> LM prompts
#         -> personalized LoRA (stage 2) -> preference alignment (stage 3) -> evaluation, table, report
#                                                                          -> cascade -> recommendations, bundle
#
# A stage's manifest.json is its target. Which folders a command needs, and the rules between them, depend on
# TASK, CRM, SYSTEM, LM, SEED, EXPERIMENT, KEY, VALUES and ALL_DATA: stages/plan.py resolves them, validates every stage's
# configuration before anything runs, and writes the rules to artifacts/<dataset>/plans/, which Make then follows.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.NOTPARALLEL:

DATASET ?= demo
TASK ?=
CRM ?=
SYSTEM ?=
LM ?=
SEED ?=
EXPERIMENT ?=
ALL_DATA ?=
KEY ?=
VALUES ?=
RAW ?=
ARGS ?=
USERS ?=
PAIRS ?=
OUT ?=
K ?=
HISTORIES ?=
TIME ?=
ON_UNKNOWN ?=
ITEMS ?=
EXCLUDE ?=
KEEP_SEEN ?=
BUNDLE ?=
SERVE ?=
HERE := $(or $(RECLLM_ARTIFACTS),artifacts)/$(or $(strip $(DATASET)),demo)

# An environment of your own: make PYTHON=/path/to/python ...; BASE_PYTHON is what .venv is made from.
BASE_PYTHON ?= python3
VENV := .venv/bin/python
PYTHON ?= $(VENV)
ifeq ($(PYTHON),$(VENV))
READY := .venv/.installed
else
READY := own-environment
endif

# Stages that do not wait for each other run side by side, each with its share of the cores (a stage that all others
# wait for, or that waits for all, has them whole): small models leave half of two cores idle. One GPU serves one stage.
JOBS ?= $(if $(wildcard /dev/nvidia*),1,2)
SHARE := $(if $(OMP_NUM_THREADS),,OMP_NUM_THREADS=$(shell echo $$((($$(getconf _NPROCESSORS_ONLN) + $(JOBS) - 1) / $(JOBS)))))

# Threads that wait spin for some microseconds only: for ever is wasteful on shared cores, not at all costs a small
# model a quarter of its speed on two threads. No fork warnings of tokenizers; no telemetry.
export GOMP_SPINCOUNT ?= 20000
# NumPy's and SciPy's own BLAS gets one thread: ARPACK's short vectors lose more by its waiting than they gain.
export OPENBLAS_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
# peft still reads a property that transformers 5 has renamed, and warns of merging a tied head's adapter: none is merged.
export PYTHONWARNINGS ?= ignore::FutureWarning:transformers.modeling_utils,ignore:Model has `tie_word_embeddings=True`:UserWarning
export PYTHON

# What was typed, for the tables; paths of this machine (RAW, PYTHON) stay out.
TYPED = $(if $(filter-out file undefined,$(origin $1)),$1='$($1)')
export RECLLM_COMMAND := $(strip make $(MAKECMDGOALS) \
  $(foreach v,DATASET TASK CRM SYSTEM LM SEED EXPERIMENT KEY VALUES ALL_DATA ARGS,$(call TYPED,$v)))

CHOICE = DATASET="$(DATASET)" TASK="$(TASK)" CRM="$(CRM)" SYSTEM="$(SYSTEM)" LM="$(LM)" SEED="$(SEED)" \
         EXPERIMENT="$(EXPERIMENT)" ALL_DATA="$(ALL_DATA)" KEY="$(KEY)" VALUES="$(VALUES)" RAW="$(RAW)" $(ARGS)
WORK := prepare stage1 stage2 stage3 evaluate report tune cascade
ASKED := $(filter $(WORK) describe,$(MAKECMDGOALS))
# Writes what Make follows, and prints where; a wrong key, value or name ends it before anything runs.
PLAN = $(PYTHON) -m stages.plan write $(ASKED) $(CHOICE)
# Follows it: a live view on a terminal, at the end where the time went.
FOLLOW = $(PYTHON) -m stages.follow "$$rules" \
         $(MAKE) --no-print-directory -j$(JOBS) -f "$$rules" SHARE='$(SHARE)'

BENCHES := profile bench-data bench-whole bench-neighbors bench-retrieval bench-loader bench-stage1 bench-tables bench-stage2 bench-lm \
           bench-sizes bench-gpu bench-stage3 bench-recommend bench-lists bench-next bench-serve

.PHONY: help env own-environment few2many sweep describe config recommend score bundle serve onnx $(WORK) $(BENCHES) status table quality nightly test test-all lint format types check clean

help:  ## list every target
	@grep -hE '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-16s %s\n", $$1, $$2}'
	@echo
	@echo '  variables: DATASET=demo|ml-1m|ml-25m|goodreads|your own  CRM="din sim"  SYSTEM="lora reclora s-dpo"  LM=tiny|path|hub-id'
	@echo '             SEED="0 1 2"  EXPERIMENT=quick  TASK=next  KEY=key VALUES="4 8"  RAW=folder-or-archive  ARGS="key=value ..."'
	@echo '             JOBS=1 (stages side by side; 2 where there is no GPU)  PYTHON=...'

prepare: | $(READY)  ## raw logs -> tables -> event log, splits, ids, candidates
stage1: | $(READY)   ## train the conventional recommendation models on all data
stage2: | $(READY)   ## tune the LM on the subsample, with and without the gate
stage3: | $(READY)   ## align the LM to preferences, evaluate every system, print the table
evaluate: | $(READY) ## evaluate every system and print the table (TASK=next: over the whole catalog)
report: | $(READY)   ## the same as evaluate, drawn anew: report.html (verdict, tables, curves)
tune: | $(READY)     ## search stage 1's settings on validation (CRM=din)
cascade: | $(READY)  ## retrieve, rank, re-rank over the whole catalog: fit the steps' weights (SYSTEM=reclora, or none)
RUN := $(filter $(WORK),$(MAKECMDGOALS))
$(firstword $(RUN)):
	+@rules=$$($(PLAN)) && exec $(FOLLOW) $(RUN)
$(wordlist 2,99,$(RUN)):
	@:

few2many:      ## tune on 0.1 %, 1 %, 5 % and 10 % of the training samples, with and without the gate: AUC and cost
	@$(MAKE) --no-print-directory report KEY=subsample VALUES="$(or $(strip $(VALUES)),0.001 0.01 0.05 0.1)"

sweep:         ## the same over any key of stage 1 or 2: KEY=stage2.adapter.num_meta VALUES="4 8 16 32"
	@$(if $(and $(strip $(KEY)),$(strip $(VALUES))),,$(error wanted KEY and VALUES, e.g. make sweep \
	KEY=stage2.adapter.num_meta VALUES="4 8 16 32"))
	@$(MAKE) --no-print-directory report KEY="$(KEY)" VALUES="$(VALUES)"

describe: | $(READY) ## look at the data: splits, histories, popularity, prompts and their tokens; describe.html
	@rules=$$($(PLAN)) && $(FOLLOW) describe
	@$(PYTHON) -m stages.describe $(CHOICE)

onnx: | $(READY)  ## CRMs as ONNX, the retriever's two towers too, checked: artifacts/<DATASET>/onnx/<crm> (CRM=sim)
	@$(PYTHON) -m stages.onnx check
	@rules=$$($(PYTHON) -m stages.plan write stage1 $(CHOICE)) && $(FOLLOW) stage1
	@$(PYTHON) -m stages.onnx $(CHOICE)

config: | $(READY)  ## every key with value, meaning and origin (of one CRM and one SYSTEM; KEY=stage2: keys that begin so)
	@$(PYTHON) -m stages.config show $(CHOICE)

status: | $(READY)  ## what is done, stale or missing, and by which commit
	@$(PYTHON) -m stages.plan status $(or $(ASKED),report) $(CHOICE)

# What `make recommend` and `make score` ask of a cascade, or of a BUNDLE.
ASKS = $(foreach v,USERS PAIRS OUT K HISTORIES TIME ON_UNKNOWN ITEMS EXCLUDE KEEP_SEEN BUNDLE,$(if $($v),$v="$($v)"))
MAKE_CASCADE = rules=$$($(PYTHON) -m stages.plan write cascade $(CHOICE)) && $(FOLLOW) cascade

recommend: | $(READY)  ## recommend to the users of a file: USERS=users.parquet K=20 OUT=recs.parquet (csv, jsonl)
	@$(if $(and $(USERS),$(OUT)),,$(error wanted USERS and OUT, e.g. make recommend USERS=users.parquet K=20 OUT=recs.parquet))
	@$(if $(BUNDLE),true,$(MAKE_CASCADE))
	@$(PYTHON) -m stages.recommend recommend $(CHOICE) $(ASKS)

score: | $(READY)  ## how likely users are to like items: PAIRS=pairs.csv OUT=scores.csv
	@$(if $(and $(PAIRS),$(OUT)),,$(error wanted PAIRS and OUT, e.g. make score PAIRS=pairs.csv OUT=scores.csv))
	@$(if $(BUNDLE),true,$(MAKE_CASCADE))
	@$(PYTHON) -m stages.recommend score $(CHOICE) $(ASKS)

bundle: | $(READY)  ## one folder that recommends anywhere: artifacts/<DATASET>/bundle/<SYSTEM> (ALL_DATA=1: trained on all splits)
	@$(MAKE_CASCADE)
	@$(PYTHON) -m stages.recommend bundle $(CHOICE)

# SERVE="--port 8001 --deadline 5": flags of python -m recllm.serving.
serve: | $(READY)  ## an HTTP service of a BUNDLE, or of a cascade that is made first: SYSTEM=reclora SERVE="--port 8000"
	@$(if $(BUNDLE),true,$(MAKE_CASCADE))
	@folder=$(if $(BUNDLE),"$(BUNDLE)",$$($(PYTHON) -m stages.recommend folder $(CHOICE))) && \
	  exec $(PYTHON) -m recllm.serving "$$folder" $(SERVE)

table: | $(READY)  ## merge artifacts/<dataset>/results.json into the tracked results/<dataset>/table.json
	@$(PYTHON) -m stages.report table $(HERE)

quality: | $(READY)  ## are the figures of artifacts/<dataset>/results.json as good as results/thresholds.json wants?
	@$(PYTHON) -m stages.report quality $(HERE)

nightly: | $(READY)  ## CRMs of MovieLens-1M, trained, evaluated and held against results/thresholds.json: RAW=path/to/ml-1m
	@$(MAKE) --no-print-directory evaluate DATASET=ml-1m CRM="deepfm gru4rec din sim" SYSTEM=none
	@$(MAKE) --no-print-directory quality DATASET=ml-1m

env: $(READY)  ## make .venv with the versions of constraints.txt
	@:

.venv/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: %s is Python %s; wanted 3.11 \
	or newer: make env BASE_PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))'
	@echo "installing into .venv (minutes)"
	@$(BASE_PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
	@touch $@

own-environment:
	@$(PYTHON) -m stages.environment

# A process a core, a file to one of them: a file's tests share what its fixtures made.
PYTEST = $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: | $(READY)  ## fast tests, offline, on all cores
	@$(PYTEST)

test-all: | $(READY)  ## all tests, the slow ones too
	@$(PYTEST) -m "slow or not slow"

lint: | $(READY)  ## ruff: errors and layout
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

format: | $(READY)  ## rewrite files in the house's layout
	@$(PYTHON) -m ruff check --fix-only .
	@$(PYTHON) -m ruff format .

types: | $(READY)  ## mypy
	@$(PYTHON) -m mypy

check: lint types test  ## lint, types and fast tests

bench-data: | $(READY)  ## preparation and neighbors of 5 to 25 million generated events (RAW: ml-1m too)
	@$(PYTHON) -m bench.scale $(if $(RAW),--raw "$(RAW)")

bench-neighbors: | $(READY)  ## neighbors of 25 million generated events, all groups of users, k = 30 (ARGS=events)
	@$(PYTHON) -m bench.neighbors $(ARGS)

bench-whole: | $(READY)  ## make stage1 stage2 stage3 on 25 million generated events, whole (ARGS="--events 1000000 --kills 120 300")
	@$(PYTHON) -m bench.whole $(ARGS)

bench-retrieval: | $(READY)  ## ways to search a history, side by side
	@$(PYTHON) -m bench.retrieval

bench-loader: .bench/fuxictr/.installed .bench/recbole/.installed | $(READY)  ## our loader, FuxiCTR's, RecBole's
	@$(PYTHON) -m bench.loader

bench-stage1: .bench/fuxictr/zoo/.installed .bench/recbole/.installed | $(READY)  ## training of DIN, SIM, DeepFM beside both
	@$(PYTHON) -m bench.stage1

# FuxiCTR's wheel lacks most of its models: they are taken from its repository (FUXICTR_GIT: a clone of yours).
FUXICTR_GIT ?= https://github.com/reczoo/FuxiCTR
FUXICTR_COMMIT := 0245987fdc1d43c36164ea496a02324885a8557a
.bench/fuxictr/zoo/.installed: .bench/fuxictr/.installed
	@rm -rf $(@D) && mkdir -p $(@D)
	@git clone --quiet --bare $(FUXICTR_GIT) $(@D)/repository
	@git --git-dir $(@D)/repository archive $(FUXICTR_COMMIT) model_zoo | tar x -C $(@D) --strip-components 1
	@rm -rf $(@D)/repository && touch $@

profile: | $(READY)  ## where a training step of a CRM goes, beside the best this machine can do (CRM=sim)
	@$(PYTHON) -m bench.profile $(or $(CRM),sim)

bench-tables: | $(READY)  ## a step of DIN by rows with tables of 1 and 6 million rows: time and memory
	@$(PYTHON) -m bench.tables

bench-stage2: | $(READY)  ## a training step of RecLoRA beside LoRA, loops, X-LoRA, and the public code's way
	@$(PYTHON) -m bench.stage2

bench-lm: | $(READY)  ## tuning and scoring with a real LM beside the LM alone, and memory: LM=smollm2-135m-instruct
	@$(if $(LM),,$(error wanted LM, e.g. make bench-lm LM=smollm2-135m-instruct))
	@$(PYTHON) -m bench.lm $(LM) $(ARGS)

bench-sizes: | $(READY)  ## memory and time of LMs of any size, calculated, and the calculation against three measured ones
	@$(PYTHON) -m bench.sizes $(ARGS)

bench-gpu: | $(READY)  ## one GPU in eight minutes: gpu tests, LoRA and RecLoRA of an 8 B LM, S-DPO, CRMs (ARGS=--tiny: any CPU)
	@$(PYTHON) -m bench.gpu $(ARGS)

bench-stage3: | $(READY)  ## a preference step and scoring: shared prompts against whole sequences
	@$(PYTHON) -m bench.stage3

bench-recommend: | $(READY)  ## users a second of each step of a finished cascade, and of searches in a million items
	@$(PYTHON) -m bench.recommend $(if $(SYSTEM),$(CHOICE))

# CASCADE=artifacts/<dataset>/cascade/<choice>: the known users of a finished cascade, not generated vectors.
CASCADE ?=
bench-lists: .bench/implicit/.installed .bench/rectools/.installed | $(READY)  ## lists for users beside implicit and RecTools
	@$(PYTHON) -m bench.recommend_peers $(CASCADE) $(ARGS)

bench-serve: | $(READY)  ## the HTTP service under load, batching against one at a time: BUNDLE=... ARGS="seconds=10 soak=100000"
	@$(if $(BUNDLE),,$(error wanted BUNDLE, e.g. make bench-serve BUNDLE=artifacts/demo/bundle/reclora))
	@$(PYTHON) -m bench.serve $(BUNDLE) $(ARGS)

# LOG=artifacts/<dataset>/log+leave-one-out: of a data set whose EXPERIMENT=leave-one-out is prepared.
LOG ?=
bench-next: .bench/rectools/.installed | $(READY)  ## RecTools' SASRec on the split of a finished event log: LOG=artifacts/ml-1m/log+leave-one-out
	@$(if $(LOG),,$(error wanted LOG, e.g. make bench-next LOG=artifacts/ml-1m/log+leave-one-out))
	@$(PYTHON) -m bench.next_item $(LOG) $(ARGS)

.bench/%/.installed: bench/peers/%.txt
	@echo "installing $* into .bench/$* (minutes)"
	@$(BASE_PYTHON) -m venv .bench/$*
	@if grep -q '^torch' $<; then .bench/$*/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0; fi
	@.bench/$*/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

clean:  ## remove artifacts/<DATASET>
	rm -rf "$(HERE)"
