# Two commands, each from a fresh clone with nothing but Python and make:
#   make demo    label photos, draw a picture     make test    format check, lint, types, tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= demo
IMAGE  ?= vitlib/assets/demo/samples/*.png
# Tests without a target of their own.
SELECTION := not hub and not cuda and not compile and not onnx and not export and not ecosystem and not processes and not browser and not ray and not tutorials and not wheel

.PHONY: demo test test-hub test-cuda test-simulated test-compile test-onnx test-export test-ecosystem test-processes test-browser test-ray test-tutorials test-wheel test-torch test-python test-lowest census bench gpu docs format clean

demo: $(VENV)/.installed
	$(BIN)/vitlib classify $(IMAGE) --model $(MODEL) --top-k 3 --plot demo.png
	@echo 'The same as a picture: demo.png'

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "$(SELECTION)"

test-hub: $(VENV)/.installed-dev  # needs a network: published checkpoints, published values
	$(BIN)/pytest -m hub

test-cuda: $(VENV)/.installed-dev  # needs a CUDA device
	$(BIN)/pytest -m cuda

SIMULATED := .venv-simulated
test-simulated: $(SIMULATED)/.installed  # the tests for GPUs without one, 15 minutes: simulated_gpu/__init__.py
	SIMULATED_GPUS=2 OMP_NUM_THREADS=1 $(SIMULATED)/bin/python -m simulated_gpu pytest -n 2 -m cuda -k 'not compiled'

# PyPI's torch for Linux is built for CUDA 13; some 5 GB with its packages.
$(SIMULATED)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SIMULATED)
	$(SIMULATED)/bin/pip install --quiet --disable-pip-version-check torch==2.14.1
	grep -Ev '^(torch|triton)==' constraints.txt > $(SIMULATED)/constraints.txt
	$(SIMULATED)/bin/pip install --quiet --disable-pip-version-check -c $(SIMULATED)/constraints.txt -e '.[dev]'
	touch $@

test-compile: $(VENV)/.installed-dev  # every family by torch's compiler; half an hour, and a C++ compiler
	OMP_NUM_THREADS=1 $(BIN)/pytest -m compile

test-onnx: $(VENV)/.installed-dev  # both exporters of torch, run by ONNX Runtime
	$(BIN)/pytest -m onnx

EXPORT := .venv-export
test-export: $(EXPORT)/.installed  # every format and family, opened by its own runtime; needs npm for one recipe
	PYTHONPATH=. $(EXPORT)/bin/pytest -m export

# MLflow brings a web server and a database; the tests' own environment does without.
$(EXPORT)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXPORT)
	$(EXPORT)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(EXPORT)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,export,openvino,mlflow,executorch]' 'tritonclient[grpc]'
	touch $@

ECOSYSTEM := .venv-ecosystem
test-ecosystem: $(ECOSYSTEM)/.installed  # scripts for timm, and libraries that take any module
	PYTHONPATH=. OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/pytest -m ecosystem tests/ecosystem

# torchvision without its operators, as in the census: no build of it is for this torch.
$(ECOSYSTEM)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(ECOSYSTEM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' peft accelerate lightning captum torchinfo opencv-python-headless
	$(ECOSYSTEM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps timm==1.0.31 torchvision==0.28.0 grad-cam ttach
	touch $@

bench: $(VENV)/.installed-dev  # ratios against transformers in one run; each group is written as it ends
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/layouts.py
	$(BIN)/python benchmarks/compare.py --quick --out build/bench/compare.md --json build/bench/compare.json

gpu:  # by the machine's own python3, which has torch for CUDA: benchmarks/README.md
	$(PYTHON) -m benchmarks.gpu

test-processes: $(VENV)/.installed-dev  # training in two processes gives the losses of one
	$(BIN)/pytest -m processes

test-browser: $(VENV)/.installed-dev  # the server's page, and every page by axe-core; needs chromium and npm
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	npm install --silent --no-audit --no-fund --prefix build/axe axe-core@4.14.1
	$(BIN)/pytest -m browser

test-ray: $(VENV)/.installed-dev  # Ray Serve and Ray Data: a replica, an actor killed amid work
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[serve,data]'
	$(BIN)/pytest -m ray

test-tutorials: $(VENV)/.installed-dev  # runs docs/tutorials/*.py end to end, two at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m tutorials --durations=5

test-wheel: $(VENV)/.installed-dev  # the built wheel in environments of its own, without the checkout
	$(BIN)/pytest -m wheel

SUPPORT := .venv-support
test-torch: $(SUPPORT)/.installed  # VERSION=2.10.0: the tests on that torch; counts go to docs/support.md
	$(SUPPORT)/bin/python -m support.run torch "$(VERSION)" --select "$(SELECTION)"

test-python: $(SUPPORT)/.installed  # PYTHON_VERSION=3.13: the tests on that Python, from PATH or by uv
	$(SUPPORT)/bin/python -m support.run python "$(PYTHON_VERSION)" --select "$(SELECTION)"

test-lowest: $(SUPPORT)/.installed  # the oldest Python and the oldest version of each dependency
	$(SUPPORT)/bin/python -m support.run lowest --select "$(SELECTION)"

$(SUPPORT)/.installed: constraints.txt
	$(PYTHON) -m venv $(SUPPORT)
	$(SUPPORT)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	touch $@

CENSUS := .venv-census
census: $(CENSUS)/.installed  # every plain ViT of three libraries, about 40 minutes; goes on after a kill
	PYTHONPATH=. OMP_NUM_THREADS=1 $(CENSUS)/bin/python -m census.run

# Libraries that cannot sit beside the tests' own: torchvision without its operators.
$(CENSUS)/.installed: constraints.txt
	$(PYTHON) -m venv $(CENSUS)
	$(CENSUS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(CENSUS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt numpy pillow safetensors huggingface-hub click tqdm pyyaml transformers ftfy regex sentencepiece
	$(CENSUS)/bin/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31 torchvision==0.28.0 open_clip_torch==3.3.0
	touch $@

DOCS := .venv-docs
docs: $(DOCS)/.installed  # the site, in build/docs, tutorials run; a warning is an error, and so is a dead link
	rm -rf docs/api/generated
	OMP_NUM_THREADS=1 $(DOCS)/bin/sphinx-build -W --keep-going -n -q -E -c docs -d build/doctrees . build/docs
	@echo 'The site: build/docs/index.html'

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch comes first and pinned: a bare "torch" would take the newest build, CUDA packages and all.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
