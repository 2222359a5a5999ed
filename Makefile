# Everything works in .venv in this checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,openvino,http
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: test test-slow lint env clean

env: $(VENV)/.installed

# torch is installed first and pinned: whatever the other packages ask for, it stays.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS),dev]'
	touch $@

test: env  ## lint, types and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not slow'

test-slow: env  ## the checks that take minutes
	$(BIN)/pytest -m slow

lint: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) run build dist site
