// SPDX-License-Identifier: MIT
// Instruction sets: every CPU kernel is compiled once per level and the best one the machine can run is chosen at run time.
//
// PK_LEVEL_TABLE(name) is name_generic, name_avx2 or name_avx512, whichever this file is being compiled for. A kernel's table is declared
// `extern const` before it is defined: a const alone is of its file only, the compiler drops it with all that it points to, and the library,
// built without a warning, does not load.
#pragma once

#define PK_JOIN_(a, b) a##_##b
#define PK_JOIN(a, b) PK_JOIN_(a, b)
#define PK_LEVEL_TABLE(name) PK_JOIN(name, PROTOKERNELS_LEVEL)
#define PK_STRINGIFY_(x) #x
#define PK_STRINGIFY(x) PK_STRINGIFY_(x)

// In a file of namespace protokernels: PK_DECLARE_LEVELS(Type, name) declares the tables of all levels, PK_CHOOSE_LEVEL(name) is the one to use.
#if defined(PROTOKERNELS_X86)
#define PK_DECLARE_LEVELS(Type, name) extern const Type name##_avx512, name##_avx2, name##_generic
#define PK_CHOOSE_LEVEL(name) \
  (cpu_level() == CpuLevel::avx512 ? name##_avx512 : cpu_level() == CpuLevel::avx2 ? name##_avx2 : name##_generic)
#else
#define PK_DECLARE_LEVELS(Type, name) extern const Type name##_generic
#define PK_CHOOSE_LEVEL(name) name##_generic
#endif

namespace protokernels {

enum class CpuLevel : int { generic, avx2, avx512 };

// The best level that this file holds, this machine runs and PROTOKERNELS_CPU_LEVEL (generic, avx2, avx512; default: no limit) allows.
// Read once. Throws for an unknown value of the variable.
CpuLevel cpu_level();
const char* cpu_level_name(CpuLevel level);

}  // namespace protokernels
