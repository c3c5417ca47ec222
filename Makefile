# Run `make help` for the targets. Every target does the set-up it needs.

PYTHON  ?= python3
STUDENT ?= mobilevlm
DATA    ?= shapes
STORE   ?= zarr
TEACHER ?=
IMAGES  ?=
CONFIG  ?=
PHASES  ?=
NPROC   ?= 1

# One folder per data set and store; a name is enough for built-in data, a path becomes its last part.
DATA_NAME := $(subst :,-,$(subst $(empty),-,$(basename $(notdir $(patsubst %/,%,$(DATA))))))
CACHE   ?= build/cache/$(DATA_NAME)-$(STORE)
OUTPUT  ?= build/runs/$(notdir $(patsubst %/,%,$(STUDENT)))-$(DATA_NAME)-$(STORE)

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# bash tests for it, dash lacks it
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup teacher-cache distill evaluate report demo demo-teacher experiment test checks format bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24
	@echo
	@echo "  Variables: STUDENT=$(STUDENT) DATA=$(DATA) STORE=$(STORE) TEACHER=$(TEACHER) IMAGES=$(IMAGES) CACHE=$(CACHE)"
	@echo "             OUTPUT=$(OUTPUT) PHASES=\"dpt dft sft\" CONFIG=file.yaml NPROC=$(NPROC) PYTHON=$(PYTHON)"

setup: $(STAMP) ## Create .venv and install everything, once

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,easy-vqa,hf]'
	@touch $@

teacher-cache: $(STAMP) ## Stage one: run the teacher once, write the cache
	$(BIN)/teacher-cache build --data '$(DATA)' --cache '$(CACHE)' --store $(STORE) $(if $(IMAGES),--images '$(IMAGES)') $(if $(TEACHER),--teacher '$(TEACHER)')

distill: teacher-cache ## Stage two: train a student from the cache (built first if missing), evaluate, report
	$(BIN)/distill run --student '$(STUDENT)' --data '$(DATA)' --cache '$(CACHE)' --output '$(OUTPUT)' $(if $(IMAGES),--images '$(IMAGES)') $(if $(CONFIG),--config '$(CONFIG)') $(if $(PHASES),--phases '$(PHASES)')
