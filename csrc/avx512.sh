#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The CPU kernels' AVX-512 code on a processor that has AVX2 only: compiles it with the instructions it names written out (csrc/emulator/avx512.h),
# in the place of the level avx2, then runs the tests of the ops. It shows whether the code for that width is right, not how fast it is.
#
#   csrc/avx512.sh                                   # the ops' tests
#   csrc/avx512.sh python_tests/test_nearest.py      # some
#
# JOBS compilers run at once (default 1). Needs g++, cmake, ninja and what the tests need. Nothing outside build/avx512 is written.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
build="$root/build/avx512"
package="$build/package"
torch="$(python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parent)')"

cmake -G Ninja -S "$root" -B "$build" -DTORCH_ROOT="$torch" -DTORCH_VERSION=any -DPython_EXECUTABLE="$(command -v python)" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$build/out" -DPROTOKERNELS_EMULATE_AVX512=ON
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
  tests=(python_tests/test_{prototypes,sinkhorn,contrastive,warp,nearest}*.py python_tests/test_{uninitialised,fuzz}.py)
fi
PYTHONPATH="$package" PROTOKERNELS_CPU_LEVEL=avx2 python -m pytest -q --import-mode=importlib -p no:cacheprovider "${tests[@]}" \
  -k "not compile and not export and not opcheck and not emulator and not reference and not autoencoder"
