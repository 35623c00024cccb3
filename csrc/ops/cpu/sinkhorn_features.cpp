// SPDX-License-Identifier: MIT
#include "ops/cpu/sinkhorn_dense.h"
namespace protokernels {
extern const SinkhornFeaturesCpu PK_LEVEL_TABLE(sinkhorn_features_cpu);
const SinkhornFeaturesCpu PK_LEVEL_TABLE(sinkhorn_features_cpu) = {};
}
