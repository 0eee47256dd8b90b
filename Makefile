# Every target does its own set-up in .venv; nothing is installed anywhere else.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV := .venv
INSTALLED := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)
# Idle OpenMP threads give up their core sooner: as fast on a quiet machine, 2.3 times faster on one
# where something else runs too.
export GOMP_SPINCOUNT := 10000

.PHONY: demo test lint bench

demo: $(INSTALLED)
	@echo "dependencies: those of requirements.lock are in $(VENV)"
	dvc repro
	@echo "report: $(CURDIR)/reports/index.html"

test: lint
	pytest

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy

# The other loaders, beside what is locked: never instead of it, whatever they declare.
bench: $(INSTALLED)
	pip install --quiet --quiet --disable-pip-version-check --no-deps --requirement requirements-bench.txt
	python -m bench.read
	python -m bench.order
	python -m bench.scale
	python -m bench.verify
	python -m bench.encode
	python -m bench.extract
	python -m bench.step
	python -m bench.generate
	python -m bench.startup
	python -m bench.full_size
	python -m bench.demo

# Gradio asks for an older Pillow and an older tomlkit than it needs: what it depends on is locked, too.
$(INSTALLED): requirements.lock requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: wanted Python 3.11 or newer, found $(PYTHON). Set PYTHON=..."; exit 2; }
	@echo "dependencies: installing those of requirements.lock into $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	pip install --quiet --quiet --disable-pip-version-check --requirement requirements.lock
	pip install --quiet --quiet --disable-pip-version-check --no-deps --requirement requirements-no-deps.txt
	@touch $@
