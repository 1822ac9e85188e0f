# make demo and make test do all set-up on a fresh machine first; repeated, they only rebuild what changed.

VENV := .venv
PYTHON := $(VENV)/bin/python
TORCH ?= torch==2.13.0
# The release that goes with it: builds of PyTorch for the CPU bring none, and 3.9 takes 1.5 times as long to compile.
TRITON ?= triton==3.7.1; sys_platform == 'linux'
GPU_PYTHON ?= python3
JOBS ?= $(shell nproc)
RESULTS ?= bench/results/cpu-amd.json
SOURCES := $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
RUFF := $(PYTHON) -m ruff
# One process per core. The hard tests of a module come one after the other, so a process that is done takes half of
# what another has left. SEED=N repeats the random inputs of an earlier run.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses logical --dist worksteal $(SEED:%=--seed % --hypothesis-seed=$(SEED))

.PHONY: demo test test-slow test-all test-hosts fuzz sanitize soak lint bench docs wheel hub gpu-check gpu-prebuilt setup setup-all clean

demo: setup
	$(PYTHON) bench/compare.py
	$(PYTHON) examples/train_lkd.py --seeds 3 --jobs $(JOBS)

# Triton compiles its kernels in the first process and interprets them in the second.
test: setup
	$(PYTEST) -m "not slow" --ignore tests/hosts
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter

# The tests that take more than a few seconds each. Some of them need the library of every instruction set.
test-slow: setup-all $(VENV)/.docs
	$(PYTEST) -m slow --ignore tests/hosts
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/interpreter

test-all: test test-slow

# The trainers and model zoos that people use kdkernels in. They are installed beside the PyTorch that is there.
test-hosts: setup
	mkdir -p build
	$(PYTHON) -c "import torch; print(f'torch=={torch.__version__}')" > build/constraints.txt
	KDKERNELS_BUILD=0 $(PYTHON) -m pip install --quiet --no-build-isolation --constraint build/constraints.txt --editable ".[hosts]"
	$(PYTEST) tests/hosts

# Thousands of hostile inputs for every loss; and of broken calls of every operator, under sanitizers.
fuzz: setup
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-2000} $(PYTHON) -m pytest tests/test_hostile.py
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-2000} tests/sanitize.sh $(PYTHON) tests/test_boundary.py -k crashes

# Thousands of steps of ever-changing sizes, that must leave no memory and no file behind.
soak: setup
	$(PYTHON) tests/soak.py

# The CPU kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, under a sample of the tests.
sanitize: setup
	tests/sanitize.sh $(PYTHON)

lint: setup
	$(RUFF) check .
	$(RUFF) format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(VENV)/bin/actionlint

# BENCH="-k test_icc --seconds 0.5" measures less; what a file of results has of other cases is kept.
bench: setup
	$(PYTHON) -m pytest bench/bench_*.py --results $(RESULTS) $(BENCH)
	$(PYTHON) bench/gpu.py --json $(dir $(RESULTS))gpu.json
	$(PYTHON) bench/report.py

# The site, in build/site. A warning is an error.
docs: setup $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# On a machine with a GPU, offline: the Python that has PyTorch there is used as it is. GPU_CHECK="--resume" goes on.
gpu-check:
	$(GPU_PYTHON) bench/gpu_check.py $(GPU_CHECK)

# The libraries that gpu-check takes along to a machine with a GPU, in build/gpu. git ignores them.
gpu-prebuilt: $(VENV)/.installed
	KDKERNELS_BUILD=cuda KDKERNELS_CUDA_VERSION=13.0 KDKERNELS_CUDA_ARCHS="90;100" KDKERNELS_CPU_ISAS="avx512;avx2" \
		$(PYTHON) setup.py --quiet build_ext --build-lib build/gpu
	ls -l build/gpu/kdkernels

# One wheel serves every Python and every torch from 2.11 on.
wheel: setup
	rm -rf dist
	$(PYTHON) -m pip install --quiet build
	KDKERNELS_BUILD=1 $(PYTHON) -m build --no-isolation --outdir dist .

# The folder in which Hugging Face's kernel-builder builds.
hub:
	rm -rf build/hub
	mkdir -p build/hub/torch-ext
	cp recipe/hub/* LICENSE build/hub
	cp -r kdkernels build/hub/torch-ext
	find build/hub \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +

# Only this processor's instruction set is compiled; a wheel has all of them.
setup: $(VENV)/.built

setup-all: $(VENV)/.built-all

$(VENV)/.installed: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade "setuptools>=77" ninja wheel "$(TORCH)" "$(TRITON)"
	KDKERNELS_BUILD=0 $(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	KDKERNELS_CPU_ISAS=$${KDKERNELS_CPU_ISAS-native} $(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.built-all: $(VENV)/.built
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	KDKERNELS_BUILD=0 $(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[docs]"
	touch $@

clean:
	rm -rf build dist *.egg-info kdkernels/*.so $(addprefix $(VENV)/.,installed built built-all docs)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
