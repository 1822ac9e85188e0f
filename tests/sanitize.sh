#!/usr/bin/env bash
# Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run their tests under them.
#     tests/sanitize.sh PYTHON
# Everything is built in a copy of the sources: the libraries of this one stay as they are.
set -euo pipefail
python=$(realpath -s "$1")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cd "$(dirname "$0")/.."
cp -r setup.py pyproject.toml README.md LICENSE csrc kdkernels tests "$copy"
cd "$copy"
rm -f kdkernels/*.so

# Python's own leaks are not ours. One instruction set is built: what ATEN_CPU_CAPABILITY names below.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export CXXFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
export LDFLAGS="-fsanitize=address,undefined"
PATH="$(dirname "$python"):$PATH" KDKERNELS_BUILD=1 KDKERNELS_CPU_ISAS=avx2 "$python" setup.py --quiet build_ext --inplace
runtimes=$(for name in asan ubsan stdc++; do "${CXX:-g++}" -print-file-name=lib$name.so; done)
export PYTHONPATH=$copy ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2 FUZZ_EXAMPLES=${FUZZ_EXAMPLES:-200}
# Not captured by pytest: what a sanitizer says as it ends the process.
LD_PRELOAD=$(tr '\n' ' ' <<<"$runtimes") "$python" -m pytest -q -s -p no:cacheprovider tests/test_hostile.py
