# Targets run in the virtual environment .venv, which they create. Targets that need other stacks run in .venv-stacks,
# which also sees the packages of .venv. `make help` lists the targets.
#
#   TORCH   the torch to install when .venv is created; any build that torch supports works
#   PYTHON  the interpreter from which .venv is created
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
.PHONY: help build test test-stacks heavy ptx gpu lint format bench bench-quick bench-compare divergences demo demo-distributed \
    demo-on-policy swap examples docs docs-serve dist wheels install-matrix clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 24

# torch is installed first with its exact version; otherwise installing fastkd would choose one. The second install
# provides the requirements of [build-system] in pyproject.toml, because the checkout is installed without build
# isolation: object files are then compiled once rather than once per install.
$(VENV)/.torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH)'
	$(PIP) install 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	$(PIP) freeze | grep -E '^torch *[=@]' > $(VENV)/constraints.txt
	@touch $@

# Later installs must not change torch.
INSTALL := $(PIP) install --no-build-isolation -c $(VENV)/constraints.txt

# Where there is nvcc, a checkout's CUDA extension is compiled for one architecture, a third of the time; newer devices
# use its PTX. Other installs are for all (setup.py).
export FASTKD_CUDA_ARCH ?= 90
build: $(VENV)/.torch ## build the native extension in place, incrementally
	@$(PY) setup.py -q build_ext --inplace

$(VENV)/.dev: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[dev,triton]'
	@touch $@

# The packages that the adapters replace, and the plotting packages of examples and benchmarks. They have many
# dependencies. torch, Triton and the checkout come from .venv, whose site-packages are appended to this environment's.
# Some packages are installed without dependencies: torchdistill requires torchvision, and a torchvision that does not
# match torch breaks the other packages; the others require other releases of it and of transformers.
ALONE := torchdistill==1.1.5 verl==0.9.1 veomni==0.1.12 nemo-automodel==0.7.0 ms-swift==4.6.0 \
    speculators==0.9.0 specforge==0.2.0 skyrl==0.3.0 axolotl==0.19.0
$(STACKS)/.stacks: $(VENV)/.dev
	test -x $(STACKS_PY) || $(PY) -m venv $(STACKS)
	@$(PY) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	    > "$$($(STACKS_PY) -c 'import site; print(site.getsitepackages()[0])')/beneath.pth"
	$(STACKS_PY) -m pip --disable-pip-version-check --no-input install -c $(VENV)/constraints.txt 'fastkd[stacks]'
	$(STACKS_PY) -m pip --disable-pip-version-check --no-input install --no-deps $(ALONE)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[demo]'
	@touch $@

# One process per core, up to four; a few files take most of the time and come first (tests/conftest.py). The tests of a
# file stay in one process and in order, because they share fixtures.
SHARED := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev build ## run the tests, except heavy ones and those of other stacks
	$(PY) -m pytest -m 'not heavy and not stacks' $(SHARED) $(ARGS)

test-stacks: $(STACKS)/.stacks build ## test the adapters against the original packages, the examples and the benchmark suite
	$(STACKS_PY) -m pytest -m 'stacks and not heavy' $(SHARED) $(ARGS)

heavy: $(STACKS)/.stacks build build/demo/.stamp ## run the heavy tests, which `make test` and `make test-stacks` omit
	$(STACKS_PY) -m pytest -m heavy $(ARGS)

ptx: $(VENV)/.dev build ## run the GPU kernels' PTX on this CPU in the machine of tests/support/ptx; writes build/ptx/report.md
	PYTHONPATH=tests $(PY) -m support.ptx.report $(ARGS)

lint: $(VENV)/.dev ## run ruff and mypy as CI does
	@status=0; for check in "ruff check ." "ruff format --check ." mypy; do \
	    echo "$$check"; $(PY) -m $$check || status=1; done; exit $$status

format: $(VENV)/.dev ## apply ruff's fixes and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) docs/walk.py

# Tables are also made of a run in which a loss was wrong; the target then fails.
define SUITE
	@mkdir -p build/bench
	@$(STACKS_PY) -m pytest bench -v -rN -p no:cacheprovider --benchmark-quiet --benchmark-json=build/bench/$(1).json $(2) $(ARGS); \
	    status=$$?; $(STACKS_PY) bench/tables.py build/bench/$(1).json && exit $$status
endef

bench-quick: $(STACKS)/.stacks build build/demo/.stamp ## compare fastkd with other libraries in about seven minutes; writes build/bench/quick.*
	$(call SUITE,quick,--quick)

bench-compare: $(STACKS)/.stacks ## compare two runs: make bench-compare BEFORE=a.json AFTER=b.json ARGS="--fail 10"
	$(STACKS_PY) bench/compare.py '$(BEFORE)' '$(AFTER)' $(ARGS)

STUDIES := loss memory accuracy topk linear online draft relations imports
bench: $(STACKS)/.stacks build build/demo/.stamp ## run the full comparison (build/bench/full.*) and all other benchmarks
	$(call SUITE,full,)
	@for study in $(STUDIES); do echo "bench/studies/$$study.py"; $(STACKS_PY) bench/studies/$$study.py || exit 1; done
	THP_MEM_ALLOC_ENABLE=1 $(STACKS_PY) bench/studies/loss.py

# Uses the torch and Triton of the interpreter GPU_PYTHON and needs no network. Set WHEELS to a folder of wheels to
# compare with the losses of those packages.
GPU_PYTHON ?= python3
WHEELS ?=
gpu: ## on a machine with a GPU: build, test, run compute-sanitizer and measure; writes bench/results/<device>/
	GPU_PYTHON='$(GPU_PYTHON)' WHEELS='$(WHEELS)' bash bench/studies/gpu.sh

divergences: $(VENV)/.dev ## after a change of fastkd/divergences.py or call/options.py: regenerate the C++ headers, rebuild, run their tests
	$(PY) csrc/generate.py
	@FASTKD_NATIVE=1 $(MAKE) --no-print-directory build
	$(PY) -m pytest -k "divergence or table" $(ARGS)

$(VENV)/.docs: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[docs]'
	@touch $@

# NO_MKDOCS_2_WARNING suppresses a notice of mkdocs-material about its successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs
.PHONY: docs docs-serve
docs: $(VENV)/.docs ## build the documentation site in build/site; warnings and dead links are errors
	$(PY) docs/drawings.py
	$(PY) docs/walk.py
	$(MKDOCS) build --strict
	$(PY) docs/site/check.py build/site

docs-serve: $(VENV)/.docs ## serve the site on http://127.0.0.1:8000 and rebuild it on changes
	$(MKDOCS) serve --watch fastkd

build/demo/.stamp: examples/demo-requirements.txt | $(VENV)/.torch
	$(PIP) install --no-deps --no-build-isolation --require-hashes --upgrade --target $(@D) -r $<
	@touch $@

# Without a GPU, do not build the CUDA extension, which takes minutes; one that already exists is kept.
demo demo-distributed demo-on-policy examples: export FASTKD_CUDA := $(or $(FASTKD_CUDA),$(if $(wildcard /dev/nvidia* fastkd/_cuda*.so),,0))
demo: $(VENV)/.demo build/demo/.stamp build ## distil a small model on this machine, with plain PyTorch and with fastkd
	OMP_WAIT_POLICY=passive $(PY) examples/demo.py $(ARGS)

demo-distributed: $(VENV)/.demo build/demo/.stamp build ## the same on several processes; fails unless the curves match those of one process
	OMP_WAIT_POLICY=passive $(PY) examples/distributed.py $(ARGS)

demo-on-policy: $(VENV)/.demo build/demo/.stamp build ## distil on text of the student's own, with the teacher in process and behind HTTP; ARGS=--tiny takes seconds
	OMP_WAIT_POLICY=passive $(PY) examples/on_policy.py $(ARGS)

SWAPS := torch_loop hf_trainer trl_gkd lightning_module modelopt_qad losses
swap: $(STACKS)/.stacks build/demo/.stamp build ## replace the losses of the training stacks that run here and compare the curves; ARGS=--tiny takes seconds
	@for script in $(SWAPS); do echo "examples/swap/$$script.py"; \
	    OMP_WAIT_POLICY=passive $(STACKS_PY) -W ignore examples/swap/$$script.py $(ARGS) || exit 1; done

$(VENV)/.examples: $(VENV)/.torch $(PROJECT) | build
	$(INSTALL) -e '.[examples]'
	@touch $@

# The folder with Fashion-MNIST's files: that of the installed Debian package, or else the package unpacked in build/,
# which does not need root.
UNPACKED := build/fashion-mnist/usr/share/datasets/fashion-mnist
FASHION ?= $(firstword $(wildcard /usr/share/datasets/fashion-mnist) $(UNPACKED))
$(UNPACKED):
	@rm -rf build/fashion-mnist && mkdir -p build/fashion-mnist/deb
	@cd build/fashion-mnist/deb && apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb . && mv usr .. && rm *.deb || { \
	    echo "Fashion-MNIST could not be fetched. On Debian or Ubuntu: apt-get update, and then this again, or apt-get" \
	        "install dataset-fashion-mnist. Elsewhere: make examples FASHION=<a folder with its four" \
	        "*-ubyte.gz files>. examples/digits.py runs without it."; exit 1; } >&2

examples: $(VENV)/.examples $(FASHION) build ## compare losses on real images; writes tables and plots to build/examples
	OMP_WAIT_POLICY=passive $(PY) examples/digits.py $(ARGS)
	OMP_WAIT_POLICY=passive $(PY) examples/fashion.py --data $(FASHION) $(ARGS)
	OMP_WAIT_POLICY=passive $(PY) examples/online.py --data $(FASHION) $(ARGS)
	OMP_WAIT_POLICY=passive $(PY) examples/sweeps.py --data $(FASHION) $(ARGS)

# The tools that make a release, pinned by hash, in an environment separate from .venv.
build/release/.stamp: .ci/release-requirements.txt
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip --disable-pip-version-check install --require-hashes -r $<
	@touch $@

dist: build/release/.stamp ## make a release of this commit in dist/: sdist, two wheels, SBOM, SHA256SUMS
	.ci/release build/release/bin/python '$(TORCH)'

wheels: build/release/.stamp ## build a wheel per Python from the sdist in dist/, in build/wheels; needs Docker. ARGS="--archs aarch64"
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) build/release/bin/python -m cibuildwheel --platform linux \
	    --output-dir build/wheels $(ARGS) dist/fastkd-*.tar.gz

# The environments of install-matrix are made from these files alone, as on a machine without a network.
build/wheelhouse/.stamp: | build/release/.stamp
	build/release/bin/python -m pip --disable-pip-version-check download -d $(@D) \
	    '$(TORCH)' 'triton>=3.5' numpy 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	@touch $@

install-matrix: build/wheelhouse/.stamp ## install the files in dist/ in fresh environments in which something is missing
	test -f dist/SHA256SUMS || $(MAKE) --no-print-directory dist
	build/release/bin/python .ci/install_matrix.py $(ARGS)

clean: ## remove build outputs, but not .venv
	rm -rf build dist *.egg-info fastkd/_C*.so fastkd/_build.json .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
