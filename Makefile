# Everything lives in .venv; `make demo` and `make test` begin with `make install`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STORE ?= demo.act

.PHONY: install demo test lint bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'actstore needs Python 3.11 or later; got ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/actstore ingest $(STORE) --model reproduction --trees 2000
	$(BIN)/actstore info $(STORE)
	$(BIN)/actstore sql $(STORE) "select role, count(*) as tokens from tokens group by all order by role"
	$(BIN)/actstore query $(STORE) accuracy_by_depth -p run reproduction
	$(BIN)/actstore show $(STORE) 1
	$(BIN)/actstore study $(STORE) probes --plot probes.png

test: lint
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy knows folders, not setuptools' package-dir: show it the package as it is installed
	rm -rf build/types && mkdir -p build/types/actstore
	ln -s $(CURDIR)/actstore/* $(CURDIR)/ingest $(CURDIR)/queries $(CURDIR)/data build/types/actstore
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p actstore

bench: .venv/bench
	$(BIN)/python -m tests.benchmarks

.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
