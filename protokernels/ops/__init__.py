# SPDX-License-Identifier: MIT
"""Public functions, one module per op; each runs the native kernel or the reference as ``protokernels.backend`` says."""
