// SPDX-License-Identifier: MIT
// Vectors as the kernels of contrastive read them: unit vectors as 16-bit floats, written once before they are read many times; others as they are.
// See contrastive_products.cuh.
#pragma once

#include "ops/cuda/contrastive_tile.cuh"

namespace {

// Four channels in a format of 16-bit floats. apart: of two parts a vector's high ones come first and then its low ones (contrastive_hopper.cuh); so
// many words it has, else 0.
__device__ __forceinline__ void write_halves(unsigned* halves, bool two, int apart, int64_t i, const float4& v) {
  uint4 words;
  split_pair(v.x, v.y, words.x, words.z);
  split_pair(v.z, v.w, words.y, words.w);
  if (two && apart > 0) {
    const int64_t vector = i / (apart / 4);
    unsigned* const to = halves + vector * apart + 2 * (i - vector * (apart / 4));
    pk::store_vector(to, uint2{words.x, words.y});
    pk::store_vector(to + apart / 2, uint2{words.z, words.w});
  } else if (two)
    pk::store_vector(halves + 4 * i, words);
  else
    pk::store_vector(halves + 2 * i, uint2{words.x, words.y});
}

// Where they lie: in a workspace, or where the vectors are.
struct Halves {
  Side rows, columns;

  Halves(const ContrastiveProblem& p, Pieces& pieces) {
    const Format format = format_of(p.precision, p.bounded);
    const int64_t words = p.Cp / channels_of_word(format);
    const bool same = p.columns == p.rows && p.M == p.R;
    rows = columns = {static_cast<const unsigned*>(p.rows), words};
    columns.vectors = static_cast<const unsigned*>(p.columns);
    if (!is_half(format)) return;
    rows.vectors = pieces.take<unsigned>(p.R * words);
    columns.vectors = same ? rows.vectors : pieces.take<unsigned>(p.M * words);
  }
};

}  // namespace
