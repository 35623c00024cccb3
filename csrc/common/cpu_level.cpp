// SPDX-License-Identifier: MIT
#include "common/cpu_level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace protokernels {

namespace {

CpuLevel machine_level() {
#if defined(PROTOKERNELS_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuLevel::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return CpuLevel::avx2;
#endif
  return CpuLevel::generic;
}

CpuLevel allowed_level() {
  const char* value = std::getenv("PROTOKERNELS_CPU_LEVEL");
  if (!value || !*value) return CpuLevel::avx512;
  for (CpuLevel level : {CpuLevel::generic, CpuLevel::avx2, CpuLevel::avx512})
    if (std::strcmp(value, cpu_level_name(level)) == 0) return level;
  throw std::runtime_error("PROTOKERNELS_CPU_LEVEL must be generic, avx2 or avx512; got " + std::string(value));
}

}  // namespace

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::avx512: return "avx512";
    case CpuLevel::avx2: return "avx2";
    default: return "generic";
  }
}

CpuLevel cpu_level() {
  static const CpuLevel level = [] {
    const CpuLevel machine = machine_level(), allowed = allowed_level();
    return machine < allowed ? machine : allowed;
  }();
  return level;
}

}  // namespace protokernels
