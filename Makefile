# make demo    the main job on real text, with the table of what it measured
# make test    the tests (no GPU needed)
# make oldest  the tests with the oldest versions of torch, triton and transformers; a large download
# make check   lint and format
# make mutants deliberate faults, each of which must turn a test red
# make bench   the CPU training-step benchmark, written to OUT
# make gpu     what a GPU can prove, in under ten minutes; installs nothing
# make budget  rewrite the golden resource budget of the compiled kernels
# make docs    regenerate the tables and pictures of the documents from bench/results
# make clean   remove the environments and the demo's folder

VENV := .venv
READY := $(VENV)/.ready
PYTHON ?= python3
OUT ?= bench/results
WORKERS ?= 2
ENV_PYTHON := $(VENV)/bin/python

.PHONY: demo test oldest check mutants bench gpu budget docs clean

demo: $(READY)
	$(ENV_PYTHON) -m artemis.cli demo

test: $(READY)
	OMP_NUM_THREADS=1 $(ENV_PYTHON) -m pytest tests -n $(WORKERS) --dist loadfile

oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --requirement requirements-oldest.txt
	PYTHONPATH=. OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest tests -n $(WORKERS) --dist loadfile

check: $(READY)
	$(ENV_PYTHON) -m ruff check .
	$(ENV_PYTHON) -m ruff format --check .

mutants: $(READY)
	$(ENV_PYTHON) -m tests.mutants

bench: $(READY)
	$(ENV_PYTHON) -m bench.train_step --out $(OUT)/cpu_train_step.jsonl

gpu:
	$(PYTHON) -m bench.gpu --out $(OUT)

budget: $(READY)
	$(ENV_PYTHON) -m tests.aot.budget --write

docs: $(READY)
	$(ENV_PYTHON) -m bench.report
	$(ENV_PYTHON) -m bench.pictures

# The environment: pinned versions, then this project itself, editable.
$(READY): requirements.txt pyproject.toml
	test -x $(ENV_PYTHON) || $(PYTHON) -m venv $(VENV)
	$(ENV_PYTHON) -m pip install --quiet --requirement requirements.txt
	$(ENV_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-oldest artemis-demo
