// SPDX-License-Identifier: MIT
// A chain of transformations as a list of steps for the kernels of warp.
//
// A pass is a stage that reads other pixels (blur, rotation) or none, followed by any stages that a pixel and its mirror images can do alone (noise,
// crop, flips). Whatever the order, a chain is at most four passes; the default order is two: blur, noise, crop, flips; rotation. A step of the
// forward kernel is a pass. A step of the backward kernel lies between two passes: it takes the adjoint of the later pass's reading stage, makes
// the values before it again, and walks back through the earlier pass's other stages.
#pragma once

#include "ops/cuda/warp_math.cuh"

namespace {

// blur: both axes, by tiles; blur_x, blur_y: one axis, straight from memory, for large radii and for sides that a tap would cross twice.
enum class Reader : int { none, blur, rotate, blur_x, blur_y };

constexpr int REACH = 6;              // largest radius of the blur by tiles
constexpr int BLUR_ELEMENTS = 17088;  // in dynamic shared memory, that its adjoint by tiles takes
constexpr int MOST_PASSES = 4;
constexpr int MOST_STEPS = 8;
constexpr int MOST_LOCAL = 4;  // stages that need no other pixels
constexpr int COLUMNS = 8;     // sums of a block: the seven parameters, and the blur along y where it has a pass of its own
constexpr int SECOND_BLUR = 7;
constexpr int SUMS = 6;  // of a step: the parameter of the stage behind, and columns 1 to 5: noise, crop, flips

struct Step {
  bool gradient;   // a step of the backward kernel; else a pass
  Reader reader;   // gives values from the source
  Reader adjoint;  // of the stage behind, if gradient
  int behind;      // column for the parameter of the stage behind, or -1
  unsigned sums;   // bits of what the step sums up, if values: bit 0 that parameter, bits 1 to 5 these columns
  int stages;      // entries of stage
  WarpStage stage[MOST_LOCAL];
  int local;    // bits of these stages
  bool values;  // gradients of parameters are wanted: values are needed
  bool is_source_image, is_grad_image, is_target_image;
  const void* source;  // [B, C, H, W]
  const void* grad;    // [B, C, H, W]
  void* target;        // [B, C, H, W] or null
};

// Division of numbers below 2^31 by one that the host knows: a product and a shift, where the device's own division takes some twenty instructions.
struct Divider {
  unsigned divisor, factor, shift;

  __device__ __forceinline__ unsigned quotient(unsigned n) const { return static_cast<unsigned>(pk::multiply_wide(n, factor) >> shift); }
};

inline Divider divider(int64_t divisor) {
  unsigned bits = 0;
  while (int64_t{1} << bits < divisor) ++bits;
  return {static_cast<unsigned>(divisor), static_cast<unsigned>((1ull << (31 + bits)) / static_cast<unsigned long long>(divisor) + 1),
          31 + bits};
}

struct Program {
  int64_t B, C;
  int H, W, tiles_x, tiles_y;
  Divider channels, tiles, tile_columns, patches, patch_columns;  // of a sample; of a plane; of a row of them
  int patch_w, patch_h;
  Kind kind;
  const void* params;      // T [B, 7]
  const int32_t* enabled;  // or null: all stages are on
  const int64_t* seed;     // or null: 0
  int radius_y, radius_x;
  double sigma_max, noise_std, half_y, half_x, sharpness;
  WarpBlurPadding padding;
  double* partial;        // [B, C tiles, COLUMNS]
  double* patch_partial;  // [B, patches]: sigma's, where the adjoint blur has a launch of its own
  unsigned* arrivals;     // [B]
  void* grad_params;      // T [B, 7] or null
  unsigned columns;       // that some step sums up
  unsigned stages;        // bits of the stages in the order
  bool clear, finish;     // the launch sets arrivals to 0; its last blocks add up the sums
  bool followed;          // the next launch may begin before this one ends: before it has waited it reads what was there before either
  int first, last;        // steps of the launch
  Step step[MOST_STEPS];

  // Bit k: stage k is on for the sample.
  __device__ __forceinline__ int on(int64_t sample) const { return enabled ? enabled[sample] : (1 << WARP_STAGES) - 1; }
};

// Steps that have a kernel of their own, with fewer registers; `any` takes every step, and those of a whole plane one after the other. The others'
// stages must come in the default order, noise, crop, flips, from which some may be missing:
//   blur: a pass that blurs by tiles; a gradient step that is nothing but the adjoint of that
//   turn: a pass that is nothing but a rotation; a gradient step with the adjoint of the rotation and values that are blurred by tiles or not at all
//   chain: of a whole plane, blur and turn forward, turn and blur backward, which is the default order
enum class Work : int { any, blur, turn, chain };

inline Work work_of(const Step& s) {
  for (int i = 1; i < s.stages; ++i)
    if (s.stage[i - 1] > s.stage[i]) return Work::any;
  if (!s.gradient) return s.reader == Reader::blur ? Work::blur : s.reader == Reader::rotate && s.stages == 0 ? Work::turn : Work::any;
  if (s.adjoint == Reader::blur && s.reader == Reader::none && s.stages == 0) return Work::blur;
  const bool plain = s.reader == Reader::blur || s.reader == Reader::none;
  return s.adjoint == Reader::rotate && plain ? Work::turn : Work::any;
}

// Of the launch's steps, passes or gradient steps.
inline Work work_of(const Program& p, bool gradient) {
  const int steps = p.last - p.first;
  const Step* const s = p.step + p.first;
  for (int i = 0; i < steps; ++i)
    if (s[i].gradient != gradient) return Work::any;
  if (steps == 1) return work_of(s[0]);
  const bool chain = steps == 2 && work_of(s[gradient ? 1 : 0]) == Work::blur && work_of(s[gradient ? 0 : 1]) == Work::turn;
  return chain ? Work::chain : Work::any;
}

template <Work work>
__device__ __forceinline__ Reader pass_reader(const Step& s) {
  return work == Work::any ? s.reader : work == Work::blur ? Reader::blur : Reader::rotate;
}
template <Work work>
__device__ __forceinline__ Reader gradient_reader(const Step& s) {
  return work == Work::any ? s.reader : work == Work::turn && s.reader == Reader::blur ? Reader::blur : Reader::none;
}
template <Work work>
__device__ __forceinline__ Reader gradient_adjoint(const Step& s) {
  return work == Work::any ? s.adjoint : work == Work::blur ? Reader::blur : Reader::rotate;
}

// The step's stages are stage_at(0), ..., stage_at(stages_of - 1), as far as they are among its bits.
template <Work work>
__device__ __forceinline__ int stages_of(const Step& s, bool gradient) {
  return work == Work::any ? s.stages : work == (gradient ? Work::blur : Work::turn) ? 0 : MOST_LOCAL;
}
template <Work work>
__device__ __forceinline__ WarpStage stage_at(const Step& s, int i) {
  if (work == Work::any) return s.stage[i];  // not by ?:, whose sides CUDA 12.4 takes for two types
  return static_cast<WarpStage>(i + static_cast<int>(WarpStage::noise));
}

struct Pass {
  Reader reader;
  int stages;
  WarpStage stage[MOST_LOCAL];
};

inline int64_t elements_of(const WarpProblem& p) { return p.B * p.C * p.H * p.W; }
inline int64_t element_size(const WarpProblem& p) { return p.double_compute ? 8 : 4; }

inline int passes_of(const WarpProblem& p, Pass (&passes)[MOST_PASSES]) {
  const auto fits = [](int64_t radius, int64_t side) { return radius == 0 || (radius <= REACH && side > 2 * REACH + 1); };
  int count = 0;
  for (int s = 0; s < p.stages; ++s) {
    const WarpStage stage = p.order[s];
    if (stage == WarpStage::rotate) {
      passes[count++] = {Reader::rotate, 0, {}};
    } else if (stage == WarpStage::blur) {
      if (p.radius_y == 0 && p.radius_x == 0) continue;
      const bool one_radius = p.radius_y == p.radius_x || p.radius_y == 0 || p.radius_x == 0;
      const bool has_room = BLUR_ELEMENTS * element_size(p) + 8192 <= static_cast<int64_t>(pk::shared_memory_limit());  // float64 may not
      if (one_radius && has_room && fits(p.radius_y, p.H) && fits(p.radius_x, p.W)) {
        passes[count++] = {Reader::blur, 0, {}};
      } else {
        if (p.radius_y > 0) passes[count++] = {Reader::blur_y, 0, {}};
        if (p.radius_x > 0) passes[count++] = {Reader::blur_x, 0, {}};
      }
    } else {
      if (count == 0) passes[count++] = {Reader::none, 0, {}};
      Pass& last = passes[count - 1];
      last.stage[last.stages++] = stage;
    }
  }
  if (count == 0) passes[count++] = {Reader::none, 0, {}};
  return count;
}

inline Step step_of(const Pass& pass) {
  Step step{};
  step.reader = pass.reader;
  step.stages = pass.stages;
  for (int i = 0; i < pass.stages; ++i) {
    step.stage[i] = pass.stage[i];
    step.local |= 1 << static_cast<int>(pass.stage[i]);
  }
  return step;
}

// The column for the parameter of a reading stage; -1: it has none.
inline int column_of(Reader reader) {
  switch (reader) {
    case Reader::none: return -1;
    case Reader::rotate: return WARP_COLUMN[static_cast<int>(WarpStage::rotate)];
    case Reader::blur_y: return SECOND_BLUR;
    default: return WARP_COLUMN[static_cast<int>(WarpStage::blur)];
  }
}

// What a step of the backward kernel sums up.
inline unsigned sums_of(const Step& step) {
  unsigned sums = step.behind < 0 ? 0 : 1u;
  for (int i = 0; i < step.stages; ++i)
    sums |= (step.stage[i] == WarpStage::crop ? 3u : 1u) << WARP_COLUMN[static_cast<int>(step.stage[i])];
  return sums;
}

// A quarter of a plane is cut into tiles; a block works on a tile and its mirror images.
constexpr int TILE_W = 32, TILE_H = 16;

inline Program program_of(const WarpProblem& p) {
  Program program{};
  program.B = p.B, program.C = p.C;
  program.H = static_cast<int>(p.H), program.W = static_cast<int>(p.W);
  program.tiles_x = static_cast<int>((p.W + 2 * TILE_W - 1) / (2 * TILE_W));
  program.tiles_y = static_cast<int>((p.H + 2 * TILE_H - 1) / (2 * TILE_H));
  program.channels = divider(p.C);
  program.tiles = divider(int64_t{program.tiles_x} * program.tiles_y), program.tile_columns = divider(program.tiles_x);
  program.kind = p.kind;
  program.params = p.params, program.enabled = p.enabled, program.seed = p.seed;
  program.radius_y = static_cast<int>(p.radius_y), program.radius_x = static_cast<int>(p.radius_x);
  program.sigma_max = p.sigma_max, program.noise_std = p.noise_std, program.sharpness = p.sharpness;
  program.half_y = p.crop_half_y, program.half_x = p.crop_half_x;
  program.padding = p.padding;
  for (int i = 0; i < p.stages; ++i) program.stages |= 1u << static_cast<int>(p.order[i]);
  return program;
}

inline int64_t blocks_of_sample(const Program& p) { return p.C * p.tiles_y * p.tiles_x; }

// A launch of its own, or behind that of the steps before.
template <class Kernel>
int launch_part(const Kernel& kernel, const Program& part, int64_t blocks, std::size_t shared_bytes, void* stream) {
  const dim3 grid(static_cast<unsigned>(part.B * blocks));
  return part.first > 0 ? PK_LAUNCH_BEHIND(kernel, grid, dim3(THREADS), shared_bytes, stream, part)
                        : PK_LAUNCH(kernel, grid, dim3(THREADS), shared_bytes, stream, part);
}

// Launches the steps [0, count): one launch if a block holds a whole plane, else one a step. launch(program, first, last).
template <class Launch>
int launch_steps(Program& program, int count, const Launch& launch) {
  const bool whole = program.tiles_y == 1 && program.tiles_x == 1;
  const int launches = whole ? 1 : count;
  for (int i = 0; i < launches; ++i) {
    program.first = whole ? 0 : i;
    program.last = whole ? count : i + 1;
    program.clear = program.grad_params && i == 0 && launches > 1;
    program.finish = program.grad_params && i == launches - 1;
    program.followed = i < launches - 1;
    const int status = launch(program);
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace
