# make quickstart   train a small CLIP on real scans and evaluate it (2 cores, a few minutes, everything included)
# make test         what every change must pass, 15 minutes at most on 2 cores
# make test-full    everything, the full-size and long cases too
# make test-latest  all that needs no PyTorch, on the newest JAX (needs a Python of 3.12 or later)
# make bench        us beside the peers: a table, JSON and a picture in runs/bench (an hour; QUICK=1: ten minutes)
# make benchmark-memory  what conversions, the loss in both forms, and saves take (a few minutes)
# make benchmark-data  the data path beside OpenCLIP's loader, and what indexes and long runs cost (15 minutes)
# make benchmark-training  training beside OpenCLIP's own loop, 200 steps in three precisions (15 minutes)
# make benchmark-evaluation  the zero-shot classifier beside OpenCLIP's, ranks beside faiss', memory (10 minutes)
# make plans        what the shipped configs take on their TPU slices, into docs/scaling.md (minutes a config)
# make lint         ruff
# make clean        removes what these have set up, and leaves your runs
# Each sets up what it needs, in folders that begin with .venv. Tests run in two processes; JOBS=1 makes it one.

SHELL := /bin/bash
PYTHON ?= python3
PYTHON_LATEST ?= $(shell for v in 3.14 3.13 3.12; do python$$v --version >/dev/null 2>&1 && { command -v python$$v; exit; }; \
  ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v*/bin/python 2>/dev/null && exit; done | head -n 1)

VENV := .venv
VENV_TEST := .venv-test
VENV_LATEST := .venv-latest
WORKDIR ?= runs/quickstart
JOBS ?= 2
PYTEST := -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder
DATASET := tfds:captioned_digits:test

# The PyTorch references, for tests only. torch: exactly this one (PyPI's newest brings gigabytes of CUDA); some
# without their dependencies, since torchvision has no CPU build and is only needed for transforms on PIL images.
# clip-anytorch is OpenAI's code; it wants pkg_resources, which setuptools dropped in version 81. img2dataset writes
# the shards that people train on.
ORACLES := "torch==2.13.0" "setuptools<81" regex tqdm packaging "transformers==5.23.0" sentencepiece protobuf \
  "img2dataset==1.47.0"
ORACLES_NO_DEPS := "torchvision==0.28.0" clip-anytorch "open_clip_torch==3.3.0" "timm==1.0.31" \
  "clip-benchmark==1.6.2" "pycocoevalcap==1.2" pycocotools

.PHONY: quickstart test test-full test-latest bench benchmark-memory benchmark-data benchmark-training benchmark-evaluation plans lint clean

quickstart: $(VENV)/.ready
	$(VENV)/bin/python train.py --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(VENV)/bin/python eval.py --model=$(WORKDIR) --task=zeroshot_classification --dataset=$(DATASET)
	@echo "The picture to look at: $$(ls $(WORKDIR)/eval/*/*_matches.png | tail -n 1)"

test: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python $(PYTEST) -m "not full"

test-full: $(VENV_TEST)/.ready
	XLA_FLAGS= $(VENV_TEST)/bin/python $(PYTEST)

ifeq ($(PYTHON_LATEST),)
test-latest:
	@echo "make test-latest: no Python 3.12 or later found; set PYTHON_LATEST=/path/to/python3.13 to run it"
else
test-latest: $(VENV_LATEST)/.ready
	$(VENV_LATEST)/bin/python $(PYTEST) -m "not full"
endif

bench: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python benchmarks/bench.py $(if $(QUICK),--quick)

benchmark-memory: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python benchmarks/conversion_memory.py
	$(VENV_TEST)/bin/python benchmarks/contrastive_loss.py
	$(VENV_TEST)/bin/python benchmarks/checkpoints.py

benchmark-data: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python benchmarks/input_pipeline.py

benchmark-training: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python benchmarks/training_beside_open_clip.py --picture=docs/training_beside_open_clip.png

benchmark-evaluation: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps faiss-cpu
	$(VENV_TEST)/bin/python benchmarks/evaluation.py

plans: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python -m clip_jax.planning.table --page=docs/scaling.md

lint: $(VENV_TEST)/.ready
	$(VENV_TEST)/bin/python -m ruff check .
	$(VENV_TEST)/bin/python -m ruff format --check .

$(VENV)/.ready: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV_TEST)/.ready: setup.cfg Makefile
	$(PYTHON) -m venv $(VENV_TEST)
	$(VENV_TEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	$(VENV_TEST)/bin/python -m pip install --quiet --disable-pip-version-check $(ORACLES) || \
	  echo "PyTorch 2.13.0 is not to be had for $$($(PYTHON) --version): the tests that compare with it will be skipped"
	$(VENV_TEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(ORACLES_NO_DEPS) || true
	@touch $@

$(VENV_LATEST)/.ready: setup.cfg
	$(PYTHON_LATEST) -m venv $(VENV_LATEST)
	$(VENV_LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_TEST) $(VENV_LATEST)
