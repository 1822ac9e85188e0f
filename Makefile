# make demo and make test do all set-up on a fresh machine first; repeated, they only rebuild what changed.

VENV := .venv
PYTHON := $(VENV)/bin/python
TORCH ?= torch==2.13.0
# The release that goes with it: builds of PyTorch for the CPU bring none, and 3.9 takes 1.5 times as long to compile.
TRITON ?= triton==3.7.1; sys_platform == 'linux'
GPU_PYTHON ?= python3
RESULTS ?= bench/results/cpu-amd.json
DOCUMENTED := kdkernels kdkernels.metrics kdkernels.info kdkernels.integrations.repdistiller kdkernels.integrations.mdistiller
SOURCES := $(shell find csrc tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
RUFF := $(PYTHON) -m ruff

.PHONY: demo test fuzz sanitize soak lint bench docs wheel gpu-check setup clean

demo: setup
	$(PYTHON) examples/train_lkd.py
	$(PYTHON) bench/compare.py

# Triton's kernels are compiled in the first process and interpreted in the second.
test: setup
	$(PYTHON) -m pytest
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/interpreter

# Thousands of hostile inputs for every operator.
fuzz: setup
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-2000} $(PYTHON) -m pytest tests/test_hostile.py

# Thousands of steps of ever-changing sizes, that must leave no memory and no file behind.
soak: setup
	$(PYTHON) tests/soak.py

# The CPU kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, under a sample of the tests.
sanitize: setup
	tests/sanitize.sh $(PYTHON)

lint: setup
	$(RUFF) check .
	$(RUFF) format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

# BENCH="-k test_icc --seconds 0.5" measures less; what a file of results has of other cases is kept.
bench: setup
	$(PYTHON) -m pytest bench/bench_*.py --results $(RESULTS) $(BENCH)
	$(PYTHON) bench/gpu.py --json $(dir $(RESULTS))gpu.json
	$(PYTHON) bench/report.py

# Drop-ins whose hosts are not installed cannot be imported; docs/drop-ins.md has them.
docs: setup
	KDKERNELS_BUILD=0 $(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[docs]"
	$(PYTHON) -m pdoc --docformat google --output-directory build/docs $(DOCUMENTED)

# On a machine with a GPU, offline: the Python that has PyTorch there is used as it is.
gpu-check:
	$(GPU_PYTHON) bench/gpu_check.py

# One wheel serves every Python and every torch from 2.11 on.
wheel: setup
	rm -rf dist
	$(PYTHON) -m pip install --quiet build
	KDKERNELS_BUILD=1 $(PYTHON) -m build --no-isolation --outdir dist .

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade "setuptools>=77" ninja wheel "$(TORCH)" "$(TRITON)"
	KDKERNELS_BUILD=0 $(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build dist *.egg-info kdkernels/*.so $(VENV)/.installed $(VENV)/.built
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
