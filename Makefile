# Every target does its own set-up in .venv; nothing is installed anywhere else.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV := .venv
INSTALLED := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)

# A test module stays in one process, so that its fixtures are made once.
PARALLEL := -n 2 --dist loadfile

.PHONY: demo mine check test lint bench bench-gpu

# LLM=llama: with the other tiny language model, which params.yaml names from then on.
demo: $(INSTALLED)
	@echo "dependencies: those of requirements.lock are in $(VENV)"
	$(if $(LLM),dvc exp run --set-param llm.model=demo/checkpoints/$(LLM),dvc repro)
	@echo "report: $(CURDIR)/reports/index.html"

ifeq ($(MAKECMDGOALS)$(PICTURES),mine)
$(error wanted make mine PICTURES=folder [CAPTIONS=file.csv])
endif

# PICTURES: a folder, an archive or a URL; CAPTIONS: a file with columns image and caption. The shell
# gets both from the environment, so that quotes in a path are no quotes of the shell.
mine: $(INSTALLED)
	python -m pipeline.propose "$$PICTURES" $${CAPTIONS:+--captions "$$CAPTIONS"}
	python -m pipeline.index --params mine.yaml
	python -m pipeline.extract --params mine.yaml
	@echo "features: $(CURDIR)/data/features. Next, after source .venv/bin/activate:"
	@echo "  python -m cache.inspect data/features    what is there; --image NAME: where a picture is"
	@echo "  cp mine.yaml params.yaml && dvc repro    with captions: trains on them and scores"

check: lint
	pytest $(PARALLEL) -m "not slow"

test: lint
	pytest $(PARALLEL)

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy

# The other loaders, beside what is locked: never instead of it, whatever they declare.
bench: $(INSTALLED)
	pip install --quiet --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-bench.txt
	pytest tests/bench/test_datasets.py
	python -m bench.read
	python -m bench.remote
	python -m bench.order
	python -m bench.scale
	python -m bench.verify
	python -m bench.encode
	python -m bench.index
	python -m bench.extract
	python -m bench.step
	python -m bench.step_llama
	python -m bench.generate
	python -m bench.startup
	python -m bench.full_size
	python -m bench.demo

# On a machine with a GPU; with ARGUMENTS=--dry-run on any.
bench-gpu: $(INSTALLED)
	python -m bench.gpu $(ARGUMENTS)

# The lock is complete, so --no-deps: Gradio declares an older Pillow and tomlkit than it needs.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: wanted Python 3.11 or newer, found $(PYTHON). Set PYTHON=..."; exit 2; }
	@echo "dependencies: installing those of requirements.lock into $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	pip install --quiet --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements.lock
	@touch $@
