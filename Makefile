# Everything runs in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak check bench clean

demo: .venv/.runtime  ## the main job on the bundled scans
	$(BIN)/synthlong demo -o demo

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

soak: .venv/.dev  ## hundreds of kills and flipped bits; about half an hour
	$(BIN)/python -m pytest -m soak -s

check: .venv/.dev  ## what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

bench: .venv/.bench
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/artifacts.py
	$(BIN)/python benchmarks/shards.py
	$(BIN)/python benchmarks/scores.py

clean:
	rm -rf .venv demo build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "synthlong needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.runtime

.venv/.bench: .venv/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	@touch $@
