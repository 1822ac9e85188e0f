#!/usr/bin/env bash
# Build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and run tests under them.
#     tests/sanitize.sh PYTHON [PYTEST ARGUMENTS]
# Without arguments: a sample of the hostile inputs, and of the calls that tests/test_boundary.py breaks.
# Everything is built in a copy of the sources: the libraries of this one stay as they are.
set -euo pipefail
python=$(realpath -s "$1")
shift
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cd "$(dirname "$0")/.."
cp -r setup.py pyproject.toml README.md LICENSE csrc kdkernels tests "$copy"
cd "$copy"
rm -f kdkernels/*.so

# Python's own leaks are not ours. An allocation that is too large fails as it does without sanitizers. One instruction set is
# built: what ATEN_CPU_CAPABILITY names below.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export CXXFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
export LDFLAGS="-fsanitize=address,undefined"
PATH="$(dirname "$python"):$PATH" KDKERNELS_BUILD=1 KDKERNELS_CPU_ISAS=avx2 "$python" setup.py --quiet build_ext --inplace
runtimes=$(for name in asan ubsan stdc++; do "${CXX:-g++}" -print-file-name=lib$name.so; done)
export PYTHONPATH=$copy ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=2
# Not captured by pytest: what a sanitizer says as it ends the process.
seeds=(${SEED:+--seed "$SEED" --hypothesis-seed="$SEED"})
run() { LD_PRELOAD=$(tr '\n' ' ' <<<"$runtimes") "$python" -m pytest -q -s -n 0 -p no:cacheprovider "${seeds[@]}" "$@"; }
if (($#)); then
  run "$@"
else
  FUZZ_EXAMPLES=${FUZZ_EXAMPLES:-200} run tests/test_hostile.py
  FUZZ_EXAMPLES=50 run tests/test_boundary.py -k crashes
fi
