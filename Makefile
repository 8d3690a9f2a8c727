# Each target sets up all it needs. Only Python 3.10 to 3.13 with venv and make are taken for granted.
PYTHON ?= python3
VENV ?= .venv
# Hypothesis examples of make fuzz, and parallel test processes.
N ?= 2000
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# timm and open_clip import torchvision, which has no build for every torch, so they live in a folder beside the environment.
VIT := $(VENV)/vit
# lmms-eval, for the same reason and because it wants older packages than the environment's (see the file of its requirements).
LMMS := $(VENV)/lmms
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv demo test test-vit test-lmms lint fuzz bench tables clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/vlprune demo $(ARGS)

# One thread a process: two processes on two cores would only wait for each other's threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)
	$(MAKE) --no-print-directory test-vit

# The adapters of timm and open_clip, which the first line skips.
test-vit: $(STAMP) $(VIT)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(VIT) $(BIN)/python -m pytest tests/test_adapter_clip.py tests/test_tower_laws.py tests/test_method_tower.py -k "timm or open_clip" -n $(JOBS)

$(VIT)/.installed: constraints.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VIT) -c constraints.txt timm open_clip_torch torchvision ftfy wcwidth
	touch $@

# Real runs of lmms-eval with the model ids that vlprune brings; part of no other target.
test-lmms: $(STAMP) $(VIT)/.installed $(LMMS)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(LMMS)):$(abspath $(VIT)) $(BIN)/python -m pytest tests/test_lmms_runs.py -m lmms $(ARGS)

$(LMMS)/.installed: tests/lmms_requirements.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(LMMS) -r tests/lmms_requirements.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	rm -rf build/typed && mkdir -p build/typed/vlprune
	cp -r vlprune/. adapters evals pyproject.toml build/typed/vlprune/ && mv build/typed/vlprune/pyproject.toml build/typed/
	cd build/typed && $(abspath $(BIN))/mypy

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 FUZZ_N=$(N) $(BIN)/python -m pytest tests/test_fuzz.py -n $(JOBS) $(ARGS)

bench: $(STAMP)
	$(BIN)/vlprune bench $(ARGS)

# Writes the generated tables and the cover picture of the README; the cases of parity are counted anew where they are at hand.
SHARED ?= ../shared
tables: $(STAMP)
	test ! -d $(SHARED)/golden || $(BIN)/python tests/reference/count_parity.py $(SHARED)
	$(BIN)/python -m vlprune.tables README.md
	$(BIN)/python -c "from vlprune.demo import cover; cover('docs/kept.png')"

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
