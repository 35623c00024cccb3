#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The CPU kernels and their torch side under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer: builds them apart, then runs
# the tests of the ops once per instruction set. The first finding ends the run with a stack trace.
#
#   csrc/sanitize.sh                                   # the ops' tests, generic and avx2 (and avx512 where the processor has it)
#   SANITIZE=thread csrc/sanitize.sh                   # races; on threads of the package's own (common/parallel.h)
#   csrc/sanitize.sh python_tests/test_nearest.py      # some; PROTOKERNELS_CPU_LEVEL=avx2 for one level
#   EMULATE=avx512 csrc/sanitize.sh                    # the AVX-512 code on a processor that has AVX2 only, in the place of the level avx2: the
#                                                      # instructions it names are written out in csrc/emulator/avx512.h
#   EMULATE=avx512 SANITIZE= csrc/sanitize.sh          # without sanitizers, optimised as for users
#
# Of every test the first case runs and a third of the others; EVERY_CASE=1 runs all, three times as long.
# SANITIZE=address alone compiles in a third of the time; JOBS compilers run at once (default 1: one takes up to 2 GB). Needs g++, cmake, ninja and
# what the tests need. Nothing outside build/sanitize is written.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
sanitizers="${SANITIZE-address,undefined,float-cast-overflow}"
case "${EMULATE:=}" in
  "") emulate=OFF found="generic avx2$(grep -qw avx512vl /proc/cpuinfo && echo ' avx512' || true)" ;;
  avx512) emulate=ON found=avx2 ;;
  *) echo "EMULATE must be avx512 or nothing; got $EMULATE" >&2 && exit 2 ;;
esac
build="$root/build/sanitize/${EMULATE:-as-it-is}-${sanitizers//,/-}"
package="$build/package"
torch="$(python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parent)')"

cmake -G Ninja -S "$root" -B "$build" -DTORCH_ROOT="$torch" -DTORCH_VERSION=any -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/out" -DPROTOKERNELS_SANITIZE="$sanitizers" -DPROTOKERNELS_EMULATE_AVX512="$emulate"
ninja -C "$build" -j "${JOBS:-1}"

# The tests see a copy of the package with this library; the installed one stays as it is.
rm -rf "$package"
mkdir -p "$package"
cp -r "$root/protokernels" "$root/python_tests" "$root/benchmarks" "$root/pyproject.toml" "$package"
rm -f "$package"/protokernels/_C*.so
cp "$build"/out/_C*.so "$package/protokernels"
cd "$package"

tests=("$@")
if ((${#tests[@]} == 0)); then
  tests=(python_tests/test_{prototypes,sinkhorn,contrastive,warp,nearest}*.py python_tests/test_fuzz.py)
  if [[ -z "$sanitizers" ]]; then tests+=(python_tests/test_uninitialised.py); fi  # it brings an allocator of its own
fi
plugin=(-p python_tests.some_cases)
[[ -z "${EVERY_CASE:-}" ]] || plugin=()
levels="${PROTOKERNELS_CPU_LEVEL:-$found}"
# Python is not instrumented, so the libraries come first; torch never frees what it caches, so leaks are no finding. Races are looked for in this
# library alone: how torch's and numpy's threads wait for each other is not to be seen. Memory lies at the same places in every run, as the thread
# sanitizer wants it.
wanted=(libasan.so libubsan.so libstdc++.so)
command=(python)
case "$sanitizers" in
  thread) wanted=(libtsan.so) command=(setarch -R python) ;;
  "") wanted=() ;;
esac
libraries="$(for name in "${wanted[@]}"; do g++ -print-file-name="$name"; done | paste -sd' ')"
for level in $levels; do
  echo "== $level"
  env PYTHONPATH="$package" PROTOKERNELS_CPU_LEVEL="$level" LD_PRELOAD="$libraries" PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
    "${command[@]}" -m pytest -x -q --import-mode=importlib -p no:cacheprovider "${plugin[@]}" "${tests[@]}" \
    -k "not compile and not export and not opcheck and not emulator and not reference and not autoencoder"
done
