# Everything runs in .venv, which the first target makes, but for what needs other people's stacks: that runs in
# .venv-stacks, which sees .venv beneath it. `make help` lists the targets.
#
#   TORCH   the torch to install there, once; any other choice, such as a build for one GPU, is as good
#   PYTHON  the interpreter that .venv is made from
#   ARGS    further arguments for pytest or the demo: make test ARGS="-k jsd -x"; "-n0" runs the tests in one process

PYTHON ?= python3
VENV ?= .venv
STACKS ?= .venv-stacks
TORCH ?= torch==2.13.0
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
STACKS_PY := $(STACKS)/bin/python
PROJECT := pyproject.toml setup.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build test test-stacks heavy gpu lint format bench bench-quick bench-compare divergences demo demo-distributed swap examples \
    docs docs-serve dist wheels install-matrix clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 24

# torch comes first and by its exact version, or resolving fastkd would choose one. The second line is what
# [build-system] in pyproject.toml asks for: the checkout is installed without build isolation, so that objects are
# compiled once and not once for each install.
$(VENV)/.torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	$(PIP) freeze | grep -E '^torch *[=@]' > $(VENV)/constraints.txt
	@touch $@

# What comes after torch leaves it alone.
INSTALL := $(PIP) install --no-build-isolation -c $(VENV)/constraints.txt

build: $(VENV)/.torch ## the native extension, in place; compiles what changed
	@$(PY) setup.py -q build_ext --inplace

$(VENV)/.dev: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[dev,triton]'
	@touch $@

# The packages that the adapters stand in for, and what the examples and benchmarks draw with. They want many others and
# none of torch's: .venv's site-packages come after this environment's own, with torch, Triton and the checkout in them.
# torchdistill wants a torchvision, and one that does not fit the torch at hand breaks the others.
$(STACKS)/.stacks: $(VENV)/.dev
	test -x $(STACKS_PY) || $(PY) -m venv $(STACKS)
	@$(PY) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	    > "$$($(STACKS_PY) -c 'import site; print(site.getsitepackages()[0])')/beneath.pth"
	$(STACKS_PY) -m pip --disable-pip-version-check --no-input install -c $(VENV)/constraints.txt 'fastkd[stacks]'
	$(STACKS_PY) -m pip --disable-pip-version-check --no-input install --no-deps torchdistill==1.1.5
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[demo]'
	@touch $@

# A process for each core, up to four, since a few files are most of the time: those come first (tests/conftest.py). A
# file's tests stay in one process and in their order, as its fixtures want it.
SHARED := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev build ## the tests, without the big grids and without other stacks
	$(PY) -m pytest -m 'not heavy and not stacks' $(SHARED) $(ARGS)

test-stacks: $(STACKS)/.stacks build ## the adapters against the packages that they stand in for, the examples, the benchmark suite
	$(STACKS_PY) -m pytest -m 'stacks and not heavy' $(SHARED) $(ARGS)

heavy: $(STACKS)/.stacks build build/demo/.stamp ## the big grids that `make test` and `make test-stacks` leave out
	$(STACKS_PY) -m pytest -m heavy $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy, as CI runs them
	@status=0; for check in "ruff check ." "ruff format --check ." mypy; do \
	    echo "$$check"; $(PY) -m $$check || status=1; done; exit $$status

format: $(VENV)/.dev ## apply what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# If a loss was wrong, the tables are written all the same, and then the target fails.
define SUITE
	@mkdir -p build/bench
	@$(STACKS_PY) -m pytest bench -v -rN -p no:cacheprovider --benchmark-quiet --benchmark-json=build/bench/$(1).json $(2) $(ARGS); \
	    status=$$?; $(STACKS_PY) bench/tables.py build/bench/$(1).json && exit $$status
endef

bench-quick: $(STACKS)/.stacks build build/demo/.stamp ## fastkd beside its peers: a comparison in under five minutes, in build/bench/quick.*
	$(call SUITE,quick,--quick)

bench-compare: $(STACKS)/.stacks ## whether a run is worse than one before: make bench-compare BEFORE=a.json AFTER=b.json ARGS="--fail 10"
	$(STACKS_PY) bench/compare.py '$(BEFORE)' '$(AFTER)' $(ARGS)

STUDIES := loss memory accuracy topk linear online relations imports
bench: $(STACKS)/.stacks build build/demo/.stamp ## the whole comparison, in build/bench/full.*, and the studies of single questions
	$(call SUITE,full,)
	@for study in $(STUDIES); do echo "bench/studies/$$study.py"; $(STACKS_PY) bench/studies/$$study.py || exit 1; done
	THP_MEM_ALLOC_ENABLE=1 $(STACKS_PY) bench/studies/loss.py

# With the torch and Triton that the machine has, and no network: GPU_PYTHON is the interpreter that holds them. Set
# WHEELS to a folder to compare with the losses of other packages in it.
GPU_PYTHON ?= python3
WHEELS ?=
gpu: ## on a machine with a GPU: build, test, sanitize and measure there; writes bench/results/<device>/
	GPU_PYTHON='$(GPU_PYTHON)' WHEELS='$(WHEELS)' bash bench/studies/gpu.sh

divergences: $(VENV)/.dev ## after a change of fastkd/divergences.py: its C++ header, the extension, the table's tests
	$(PY) csrc/generate.py
	@FASTKD_NATIVE=1 $(MAKE) --no-print-directory build
	$(PY) -m pytest -k "divergence or table" $(ARGS)

$(VENV)/.docs: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[docs]'
	@touch $@

# The notice is of mkdocs-material on its own successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs
.PHONY: docs docs-serve
docs: $(VENV)/.docs ## the documentation site, in build/site; a warning or a dead link is an error
	$(PY) docs/drawings.py
	$(MKDOCS) build --strict
	$(PY) docs/site/check.py build/site

docs-serve: $(VENV)/.docs ## the same on http://127.0.0.1:8000, rebuilt as you write
	$(MKDOCS) serve --watch fastkd

build/demo/.stamp: examples/demo-requirements.txt | $(VENV)/.torch
	$(PIP) install --no-deps --no-build-isolation --require-hashes --upgrade --target $(@D) -r $<
	@touch $@

# Without a GPU they have no use for CUDA's extension, which takes nvcc minutes; one that is there is left alone.
demo demo-distributed examples: export FASTKD_CUDA := $(or $(FASTKD_CUDA),$(if $(wildcard /dev/nvidia* fastkd/_cuda*.so),,0))
demo: $(VENV)/.demo build/demo/.stamp build ## distil a small model on this machine, in plain PyTorch and with fastkd
	OMP_WAIT_POLICY=passive $(PY) examples/demo.py $(ARGS)

demo-distributed: $(VENV)/.demo build/demo/.stamp build ## the same over several processes, and that the curves are those of one
	OMP_WAIT_POLICY=passive $(PY) examples/distributed.py $(ARGS)

SWAPS := torch_loop hf_trainer trl_gkd lightning_module
swap: $(STACKS)/.stacks build/demo/.stamp build ## a loss replaced in four training stacks, and the curves side by side; ARGS=--tiny takes seconds
	@for script in $(SWAPS); do echo "examples/swap/$$script.py"; \
	    OMP_WAIT_POLICY=passive $(STACKS_PY) -W ignore examples/swap/$$script.py $(ARGS) || exit 1; done

$(VENV)/.examples: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[examples]'
	@touch $@

# The folder of Fashion-MNIST's files: where Debian's package puts them, or else that package unpacked here, for which
# nobody has to be root.
UNPACKED := build/fashion-mnist/usr/share/datasets/fashion-mnist
FASHION ?= $(firstword $(wildcard /usr/share/datasets/fashion-mnist) $(UNPACKED))
$(UNPACKED):
	@rm -rf build/fashion-mnist && mkdir -p build/fashion-mnist/deb
	@cd build/fashion-mnist/deb && apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb . && mv usr .. && rm *.deb || { \
	    echo "Fashion-MNIST could not be fetched. On Debian or Ubuntu: apt-get update, and then this again, or apt-get" \
	        "install dataset-fashion-mnist. Elsewhere: make examples FASHION=<a folder with its four" \
	        "*-ubyte.gz files>. examples/digits.py runs without it."; exit 1; } >&2

examples: $(VENV)/.examples $(FASHION) build ## what the losses do on real images: tables and plots in build/examples
	OMP_WAIT_POLICY=passive $(PY) examples/digits.py $(ARGS)
	OMP_WAIT_POLICY=passive $(PY) examples/fashion.py --data $(FASHION) $(ARGS)
	OMP_WAIT_POLICY=passive $(PY) examples/online.py --data $(FASHION) $(ARGS)
	OMP_WAIT_POLICY=passive $(PY) examples/sweeps.py --data $(FASHION) $(ARGS)

# The tools of a release, by hash and apart from .venv, which keeps what it tests with.
build/release/.stamp: .ci/release-requirements.txt
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip --disable-pip-version-check install --require-hashes -r $<
	@touch $@

dist: build/release/.stamp ## what a release of this commit consists of, in dist/: sdist, two wheels, SBOM, SHA256SUMS
	.ci/release build/release/bin/python '$(TORCH)'

wheels: build/release/.stamp ## from the sdist in dist/, one for each Python in build/wheels; takes Docker. ARGS="--archs aarch64"
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) build/release/bin/python -m cibuildwheel --platform linux \
	    --output-dir build/wheels $(ARGS) dist/fastkd-*.tar.gz

# Environments are made of these files alone, as a machine without a network would.
build/wheelhouse/.stamp: | build/release/.stamp
	build/release/bin/python -m pip --disable-pip-version-check download -d $(@D) \
	    '$(TORCH)' 'triton>=3.5' numpy 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	@touch $@

install-matrix: build/wheelhouse/.stamp ## install what is in dist/ where something is missing, each time in a fresh environment
	test -f dist/SHA256SUMS || $(MAKE) --no-print-directory dist
	build/release/bin/python .ci/install_matrix.py $(ARGS)

clean: ## remove what a build writes, but not .venv
	rm -rf build dist *.egg-info fastkd/_C*.so fastkd/_build.json .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
