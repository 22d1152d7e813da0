# Every target sets up what it needs in .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-real test test-slow test-all bench lint docs clean

demo: .venv/.run  ## compare three methods on a real task, with a report
	$(BIN)/stepwell compare countdown --methods grpo,ppo,dpo --budget 60s --seeds 1 --out runs/demo

demo-real: .venv/.test  ## teach SmolLM2-135M to answer with a number only; needs its weights (benchmarks/language/real.py)
	$(BIN)/python benchmarks/language/real.py demo runs/demo-real

test: .venv/.test  ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/.test  ## the slow tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

test-all: .venv/.test  ## the tests, with the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m ''

bench: .venv/.test  ## what is measured against peers: make bench NAME=language
	$(BIN)/python benchmarks/$(or $(NAME),language)/run.py

lint: .venv/.lint  ## style, types, and the rule that rooms import downwards only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.run  ## write docs/methods.md from the cards, docs/solvers.md from the tables
	$(BIN)/python docs/write_methods.py
	$(BIN)/python docs/write_solvers.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable .
	@touch $@

.venv/.test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[test]'
	@touch $@ .venv/.run

.venv/.lint: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) --editable '.[test,lint]'
	@touch $@ .venv/.run .venv/.test
