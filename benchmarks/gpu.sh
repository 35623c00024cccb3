#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Everything that needs a GPU, in one command: build, tests, kernel benchmarks, compute-sanitizer, summary.
#
#   benchmarks/gpu.sh                        # what is not finished yet, within 8 minutes
#   benchmarks/gpu.sh tests sanitizer        # these stages only
#   benchmarks/gpu.sh --dry-run              # the plan
#
# PYTHON=... chooses the interpreter; benchmarks/gpu.py does the work.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The benchmarks are no installed package: Python has to look for them here.
PYTHONSAFEPATH="" exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
