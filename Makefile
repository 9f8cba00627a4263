# make demo: a question about a long text, answered by a real model.  make test: the test suite.
# make serve: the same model for OpenAI's clients and in a browser; documents are kept in .documents.
# make ask: the demo's question, asked through one of them.
# Tests run in two processes of one thread each; the many that these start find modules compiled, whatever is set
# outside. PYTHON picks the interpreter of the virtual environment (3.11 or newer), ARGS goes
# to the server, or to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test serve ask

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

serve: $(VENV)/.installed-serve
	$(BIN)/python -m longrun.server --documents .documents $(ARGS)

ask: $(VENV)/.installed-serve
	$(BIN)/python scripts/ask.py --file "$$($(BIN)/python scripts/demo.py --write)" 'What is a lambda expression?'

test: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-serve: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[serve]' openai
	touch $@ $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
