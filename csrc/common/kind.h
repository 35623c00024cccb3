// SPDX-License-Identifier: MIT
// The floating-point kinds a kernel reads and writes, without torch's headers.
#pragma once

namespace protokernels {

enum class Kind : int { f32, f64, bf16, f16 };

}  // namespace protokernels

using protokernels::Kind;
