// SPDX-License-Identifier: MIT
// One mistake per kernel, each marked at its line. 64 threads a block, so that two warps meet.
#include "common/simt.cuh"
#include "emulator/selftest/selftest.h"

namespace {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int block_threads = 64;

template <Mistake mistake>
__global__ void broken_kernel(float* in, float* out, int size) {
  PK_SHARED(float, values, block_threads);
  const int thread = threadIdx.x;
  const int neighbour = (thread + 33) % block_threads;  // in the other warp
  const int i = blockIdx.x * block_threads + thread;

  if constexpr (mistake == Mistake::missing_barrier) {
    values[thread] = in[i];
    out[i] = values[neighbour];  // mistake: no barrier
  } else if constexpr (mistake == Mistake::read_before_write) {
    if (thread < block_threads - 1) values[thread] = in[i];
    __syncthreads();
    out[i] = values[neighbour];  // mistake: the last element
  } else if constexpr (mistake == Mistake::unwritten_output) {
    if (i < size - 1) out[i] = in[i];  // mistake: one short
  } else if constexpr (mistake == Mistake::global_out_of_bounds) {
    out[i] = in[i + 1];  // mistake: one past the end
  } else if constexpr (mistake == Mistake::global_write_out_of_bounds) {
    out[i + 1] = in[i];  // mistake: one past the end
  } else if constexpr (mistake == Mistake::shared_out_of_bounds) {
    float* pointer = values;
    pointer[thread + 1] = in[i];  // mistake: one past the end
    __syncthreads();
    out[i] = pointer[thread + 1];
  } else if constexpr (mistake == Mistake::divergent_barrier) {
    if (thread < 32) {
      __syncthreads();  // mistake: first half here
    } else {
      __syncthreads();  // mistake: second half here
    }
    out[i] = in[i];
  } else if constexpr (mistake == Mistake::return_before_barrier) {
    if (thread >= 32) return;  // mistake: leaves the others waiting
    __syncthreads();
    out[i] = in[i];
  } else if constexpr (mistake == Mistake::divergent_shuffle) {
    float value = in[i];
    if (thread % 2 == 0) value += __shfl_xor_sync(all_lanes, value, 2);  // mistake: half of the lanes
    __syncthreads();
    out[i] = value;
  } else if constexpr (mistake == Mistake::foreign_mask) {
    out[i] = __shfl_sync(0x0000ffffu, in[i], 0);  // mistake: lanes 16..31 are not in the mask
  } else if constexpr (mistake == Mistake::copy_not_waited) {
    pk::copy_async_4(&values[thread], in + i);
    pk::copy_async_commit();
    __syncthreads();
    out[i] = values[thread];  // mistake: no wait
  } else if constexpr (mistake == Mistake::copy_without_barrier) {
    pk::copy_async_4(&values[thread], in + i);
    pk::copy_async_commit();
    pk::copy_async_wait<0>();
    out[i] = values[neighbour];  // mistake: no barrier
  } else if constexpr (mistake == Mistake::write_after_read) {
    values[thread] = in[i];
    __syncthreads();
    const float value = values[neighbour];
    values[thread] = 2.0f * in[i];  // mistake: a neighbour may not have read yet
    out[i] = value;
  } else if constexpr (mistake == Mistake::write_write) {
    values[thread % 32] = in[i];  // mistake: both warps
    __syncthreads();
    out[i] = values[thread % 32];
  } else if constexpr (mistake == Mistake::missing_warp_barrier) {
    values[thread] = in[i];
    const float sum = __shfl_xor_sync(all_lanes, in[i], 1);
    out[i] = values[thread ^ 1] + sum;  // mistake: a shuffle orders no memory
  } else if constexpr (mistake == Mistake::misaligned_vector) {
    if (4 * thread + 5 <= size) {
      const float4 value = pk::load_vector<float4>(in + 4 * thread + 1);  // mistake: not a multiple of 16 bytes
      out[thread] = value.x + value.y + value.z + value.w;
    }
  } else if constexpr (mistake == Mistake::misaligned_cast) {
    if (4 * thread + 5 <= size) {
      const float4 value = *reinterpret_cast<const float4*>(in + 4 * thread + 1);  // mistake: not a multiple of 16 bytes
      out[thread] = value.x + value.y + value.z + value.w;
    }
  } else if constexpr (mistake == Mistake::misaligned_copy) {
    if (thread == 0) pk::copy_async_16(&values[0], in + 1);  // mistake: not a multiple of 16 bytes
    pk::copy_async_commit();
    pk::copy_async_wait<0>();
    __syncthreads();
    out[i] = values[0];
  } else if constexpr (mistake == Mistake::unordered_blocks) {
    out[i] = in[i];
    __syncthreads();
    if (blockIdx.x > 0) out[i] += out[i - block_threads];  // mistake: the other block may not have run
  } else if constexpr (mistake == Mistake::unpublished_block) {
    if (thread > 0) out[i] = in[i];
    __threadfence();
    if (thread == 0) atomicAdd(&out[i], 1.0f);  // announces what the other threads may not have written
    __syncthreads();
    if (blockIdx.x > 0 && thread > 0) out[i] += out[i - block_threads];  // mistake: no barrier before the announcement
  } else if constexpr (mistake == Mistake::modified_input) {
    in[i] = 0.0f;  // mistake: inputs are never modified
    out[i] = 1.0f;
  } else if constexpr (mistake == Mistake::spin_on_memory) {
    __syncthreads();
    volatile float* flag = out + size - 1;
    if (thread == 40)
      while (*flag != 1.0f) continue;  // mistake: nobody sets it
    if (i < size - 1) out[i] = in[i];
  } else if constexpr (mistake == Mistake::spin_on_an_atomic) {
    if (i == 0)
      while (atomicAdd(out, 0.0f) != 1.0f) continue;  // mistake: nobody sets it
    __syncthreads();
  } else if constexpr (mistake == Mistake::grid_barrier) {
    auto* arrived = reinterpret_cast<unsigned*>(out);  // starts as 0xffffffff
    if (thread == 0) {
      atomicAdd(arrived, 1u);
      while (atomicAdd(arrived, 0u) != gridDim.x - 1) continue;  // mistake: the other block has not begun
    }
    __syncthreads();
  } else if constexpr (mistake == Mistake::endless_loop) {
    float sum = 0.0f;
    for (unsigned k = 0; k < 64; k += size / 256) sum = sum * 0.5f + in[i];  // mistake: the step is 0
    out[i] = sum;
  } else if constexpr (mistake == Mistake::endless_barriers) {
    while (__syncthreads_or(thread == 0)) continue;  // mistake: thread 0 never agrees
    out[i] = in[i];
  } else if constexpr (mistake == Mistake::trap) {
    if (thread == 5) __trap();
    out[i] = in[i];
  }
}

template <Mistake mistake>
int launch_one(float* in, float* out, int threads, void* stream) {
  return PK_LAUNCH((broken_kernel<mistake>), threads / block_threads, block_threads, 0, stream, in, out, threads);
}

}  // namespace

int launch_broken(Mistake mistake, float* in, float* out, int threads, void* stream) {
  switch (mistake) {
#define PK_CASE(name) \
  case Mistake::name: return launch_one<Mistake::name>(in, out, threads, stream);
    PK_CASE(missing_barrier)
    PK_CASE(read_before_write)
    PK_CASE(unwritten_output)
    PK_CASE(global_out_of_bounds)
    PK_CASE(global_write_out_of_bounds)
    PK_CASE(shared_out_of_bounds)
    PK_CASE(divergent_barrier)
    PK_CASE(return_before_barrier)
    PK_CASE(divergent_shuffle)
    PK_CASE(foreign_mask)
    PK_CASE(copy_not_waited)
    PK_CASE(copy_without_barrier)
    PK_CASE(write_after_read)
    PK_CASE(write_write)
    PK_CASE(missing_warp_barrier)
    PK_CASE(misaligned_vector)
    PK_CASE(misaligned_cast)
    PK_CASE(misaligned_copy)
    PK_CASE(unordered_blocks)
    PK_CASE(unpublished_block)
    PK_CASE(modified_input)
    PK_CASE(spin_on_memory)
    PK_CASE(spin_on_an_atomic)
    PK_CASE(grid_barrier)
    PK_CASE(endless_loop)
    PK_CASE(endless_barriers)
    PK_CASE(trap)
#undef PK_CASE
  }
  return 1;
}
