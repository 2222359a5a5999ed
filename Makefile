# The two commands of the README are `make align` and `make test`; both work in .venv in this checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := train,openvino,http
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: align test test-slow lint env clean

env: $(VENV)/.installed

# torch is installed first and pinned: whatever the other packages ask for, it stays.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS),dev]'
	touch $@

align: env  ## run the whole pipeline on the shipped charter and prompts; ends with run/report.html
	$(BIN)/charter align --output run

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
