# Every target makes .venv when it is missing or stale (tools/setup_environment.py) and needs nothing else.
# Python 3.11 is looked for under its usual names; `make PYTHON=/path/to/python3.11 demo` names one.
SHELL := /bin/sh
PYTHON := $(shell for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { command -v "$$p"; break; }; done)
RUN := .venv/bin/python -m
# Two processes; tests in the order of their names, for a service takes a part of the Ray that it shares with others.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast check fix bench venv browser
.DEFAULT_GOAL := test

venv:
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed and was not found: install it, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" tools/setup_environment.py

# The page's test drives a real browser. Without one that test fails and says what to install.
browser: venv
	@"$(PYTHON)" tools/browser.py || true

demo: venv
	$(RUN) unicuco.cli.demo

test: browser
	$(RUN) pytest -m "not alone" $(SIDE_BY_SIDE); first=$$?; $(RUN) pytest -m alone && exit $$first

test-fast: venv
	$(RUN) pytest -m "not slow and not alone" $(SIDE_BY_SIDE)

check: venv
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	.venv/bin/lint-imports

fix: venv
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

bench: venv
	$(RUN) benchmarks
