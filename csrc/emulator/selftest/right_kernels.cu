// SPDX-License-Identifier: MIT
#include "common/simt.cuh"
#include "emulator/selftest/selftest.h"

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

__global__ void places_kernel(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] =
      ((blockIdx.x * 10 + blockIdx.y) * 10 + blockIdx.z) * 1000 + (threadIdx.x * 10 + threadIdx.y) * 10 + threadIdx.z;
}

__constant__ float scale_table[4];

__global__ void transpose_kernel(const float* __restrict__ in, float* __restrict__ out, int rows, int columns) {
  PK_SHARED(float, tile, 16, 17);
  int row = blockIdx.y * 16 + threadIdx.y;
  int column = blockIdx.x * 16 + threadIdx.x;
  if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = in[row * columns + column];
  __syncthreads();
  row = blockIdx.y * 16 + threadIdx.x;
  column = blockIdx.x * 16 + threadIdx.y;
  if (row < rows && column < columns) out[column * rows + row] = tile[threadIdx.x][threadIdx.y] * scale_table[column % 4];
}

__device__ __forceinline__ float add_up(float* scratch, float value) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int width = blockDim.x / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) scratch[threadIdx.x] += scratch[threadIdx.x + width];
    __syncthreads();
  }
  return scratch[0];
}

__global__ void block_sums_kernel(const float* in, float* out) {
  PK_DYNAMIC_SHARED(float, scratch);
  const float sum = add_up(scratch, in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void block_votes_kernel(const int* in, int* out) {
  const int predicate = in[threadIdx.x];
  const int count = __syncthreads_count(predicate);
  const int any = __syncthreads_or(predicate);
  const int all = __syncthreads_and(predicate);
  out[threadIdx.x] = count;
  out[blockDim.x + threadIdx.x] = any;
  out[2 * blockDim.x + threadIdx.x] = all;
}

template <typename T>
__global__ void shuffles_kernel(const T* in, T* out, int argument, int width) {
  const int lane = threadIdx.x;
  const T value = in[lane];
  out[lane] = __shfl_sync(all_lanes, value, argument, width);
  out[32 + lane] = __shfl_up_sync(all_lanes, value, argument, width);
  out[64 + lane] = __shfl_down_sync(all_lanes, value, argument, width);
  out[96 + lane] = __shfl_xor_sync(all_lanes, value, argument, width);
}

__global__ void votes_kernel(const int* in, unsigned* out, unsigned mask) {
  const int lane = threadIdx.x;
  if (((mask >> lane) & 1u) == 0) return;
  const int value = in[lane];
  const unsigned results[] = {
      __ballot_sync(mask, value > 0),
      static_cast<unsigned>(__any_sync(mask, value > 0)),
      static_cast<unsigned>(__all_sync(mask, value > 0)),
      __match_any_sync(mask, value),
      static_cast<unsigned>(__reduce_add_sync(mask, value)),
      static_cast<unsigned>(__reduce_min_sync(mask, value)),
      static_cast<unsigned>(__reduce_max_sync(mask, value)),
      __reduce_and_sync(mask, static_cast<unsigned>(value)),
      __reduce_or_sync(mask, static_cast<unsigned>(value)),
      __reduce_xor_sync(mask, static_cast<unsigned>(value)),
  };
  for (int i = 0; i < 10; ++i) out[32 * i + lane] = results[i];
}

__global__ void atomics_kernel(const int* in, int size, int bins, int* counts, float* sum_float, double* sum_double, int* extremes,
                               unsigned* compare_swap_sum, unsigned* tickets) {
  PK_SHARED(int, block_counts, 64);
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) block_counts[bin] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) {
    const int value = in[i];
    atomicAdd(&block_counts[value % bins], 1);
    atomicAdd(sum_float, static_cast<float>(value));
    atomicAdd(sum_double, static_cast<double>(value));
    atomicMin(&extremes[0], value);
    atomicMax(&extremes[1], value);
    unsigned seen = atomicAdd(compare_swap_sum, 0u);
    while (true) {
      const unsigned previous = atomicCAS(compare_swap_sum, seen, seen + static_cast<unsigned>(value));
      if (previous == seen) break;
      seen = previous;
    }
    tickets[1 + i] = atomicAdd(&tickets[0], 1u);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) atomicAdd(&counts[bin], block_counts[bin]);
}

// A copy of several floats serves several threads, hence the barrier after the wait; the same barrier keeps a stage from being
// refilled while a slower thread still reads it.
__global__ void pipeline_kernel(const float* in, float* out, int rows, int columns, int width) {
  PK_SHARED(float, stages, 3, 64);
  const int column = blockIdx.x * 64 + threadIdx.x;
  const auto fetch = [&](int row) {
    if (row < rows && threadIdx.x % width == 0) {
      const bool valid = column < columns;
      float* target = &stages[row % 3][threadIdx.x];
      const float* source = valid ? in + row * columns + column : in;
      if (width == 4) pk::copy_async_16(target, source, valid);
      if (width == 2) pk::copy_async_8(target, source, valid);
      if (width == 1) pk::copy_async_4(target, source, valid);
    }
    pk::copy_async_commit();
  };
  fetch(0);
  fetch(1);
  float sum = 0.0f;
  for (int row = 0; row < rows; ++row) {
    pk::copy_async_wait<1>();
    __syncthreads();
    sum += stages[row % 3][threadIdx.x];
    fetch(row + 2);
  }
  if (column < columns) out[column] = sum;
}

__global__ void mma_kernel(const float* a, const float* b, float* out, int depth, MmaKind kind) {
  const int group = threadIdx.x / 4;
  const int member = threadIdx.x % 4;
  float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto a_at = [&](int row, int k) { return a[row * depth + k]; };
  const auto b_at = [&](int k, int column) { return b[k * 8 + column]; };
  for (int k = 0; k < depth; k += kind == MmaKind::tf32 ? 8 : 16) {
    if (kind != MmaKind::tf32) {
      const auto pack = [&](float low, float high) { return kind == MmaKind::bf16 ? pk::pack_bf16(low, high) : pk::pack_f16(low, high); };
      unsigned a_bits[4], b_bits[2];
      for (int i = 0; i < 4; ++i) {
        const int row = group + 8 * (i % 2);
        const int column = k + 2 * member + 8 * (i / 2);
        a_bits[i] = pack(a_at(row, column), a_at(row, column + 1));
      }
      for (int i = 0; i < 2; ++i) {
        const int row = k + 2 * member + 8 * i;
        b_bits[i] = pack(b_at(row, group), b_at(row + 1, group));
      }
      if (kind == MmaKind::bf16)
        pk::mma_m16n8k16_bf16(d, a_bits, b_bits);
      else
        pk::mma_m16n8k16_f16(d, a_bits, b_bits);
    } else {
      const unsigned a_bits[4] = {pk::to_tf32(a_at(group, k + member)), pk::to_tf32(a_at(group + 8, k + member)),
                                  pk::to_tf32(a_at(group, k + member + 4)), pk::to_tf32(a_at(group + 8, k + member + 4))};
      const unsigned b_bits[2] = {pk::to_tf32(b_at(k + member, group)), pk::to_tf32(b_at(k + member + 4, group))};
      pk::mma_m16n8k8_tf32(d, a_bits, b_bits);
    }
  }
  for (int i = 0; i < 4; ++i) out[(group + 8 * (i / 2)) * 8 + 2 * member + i % 2] = d[i];
}

__global__ void rounding_kernel(const float* in, unsigned* tf32, __nv_bfloat16* bf16, __half* half, float* back, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  tf32[i] = pk::to_tf32(in[i]);
  bf16[i] = __float2bfloat16_rn(in[i]);
  half[i] = __float2half_rn(in[i]);
  back[i] = __bfloat162float(bf16[i]);
  back[size + i] = __half2float(half[i]);
}

__global__ void powers_kernel(const float* in, float* out, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) out[i] = pk::exp2_fast(in[i]);
}

__global__ void vector_copy_kernel(const float* in, float* out, int vectors) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  const float4 value = pk::load_vector<float4>(in + 4 * i);
  pk::store_vector(out + 4 * i, value);
}

__global__ void last_block_sum_kernel(const float* in, float* partial, unsigned* counter, float* out) {
  PK_SHARED(float, scratch, 64);
  PK_SHARED(unsigned, finished);
  const float sum = add_up(scratch, in[blockIdx.x * 64 + threadIdx.x]);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) finished = atomicAdd(counter, 1u);
  __syncthreads();
  if (finished != gridDim.x - 1) return;
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) total += __ldcg(partial + block);
    out[0] = total;
    *counter = 0u;  // ready for the next launch
  }
}

__global__ void warp_exchange_kernel(const float* in, float* out) {
  PK_SHARED(float, values, 128);
  for (int round = 0; round < 2; ++round) {
    values[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 1];
    __syncwarp();
  }
  // The two halves of a warp go their own ways, each with its own mask.
  if (threadIdx.x % 32 < 16) {
    values[threadIdx.x] = 0.0f;
    __syncwarp(0x0000ffffu);
    out[threadIdx.x] += values[threadIdx.x ^ 1];
  } else {
    values[threadIdx.x] = 1.0f;
    __syncwarp(0xffff0000u);
    out[threadIdx.x] += values[threadIdx.x ^ 1];
  }
}

__global__ void half_rotate_kernel(const float* in, float* out) {
  PK_SHARED(__half, values, 128);
  values[threadIdx.x] = __float2half_rn(in[threadIdx.x]);
  __syncthreads();
  out[threadIdx.x] = __half2float(values[(threadIdx.x + 1) % blockDim.x]);
}

__global__ void workload_kernel(const float* in, float* out, int rounds) {
  PK_DYNAMIC_SHARED(float, exchange);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float value = in[i];
  for (int round = 0; round < rounds; ++round) {
    float sum = value;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(all_lanes, sum, offset);
    exchange[threadIdx.x] = value + sum / 32.0f;
    __syncthreads();
    value = 0.5f * exchange[(threadIdx.x + 37) % blockDim.x];
    __syncthreads();
  }
  out[i] = value;
}

__global__ void probe_kernel(int* out, int dynamic_floats) {
  PK_SHARED(float, fixed, 2048);
  PK_DYNAMIC_SHARED(float, scratch);
  if (threadIdx.x == 0 && threadIdx.z == 0) {
    fixed[2047] = 1.0f;
    if (dynamic_floats > 0) scratch[dynamic_floats - 1] = 2.0f;
    out[blockIdx.x] = static_cast<int>(fixed[2047]) + (dynamic_floats > 0 ? static_cast<int>(scratch[dynamic_floats - 1]) : 0);
  }
}

}  // namespace

int launch_places(int* out, int grid_x, int grid_y, int grid_z, int block_x, int block_y, int block_z, void* stream) {
  return PK_LAUNCH(places_kernel, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), 0, stream, out);
}

int launch_transpose(const float* in, float* out, int rows, int columns, const float* host_scale, void* stream) {
  const int status = PK_SET_CONSTANT(scale_table, host_scale, 4 * sizeof(float), stream);
  if (status != 0) return status;
  return PK_LAUNCH(transpose_kernel, dim3((columns + 15) / 16, (rows + 15) / 16), dim3(16, 16), 0, stream, in, out, rows, columns);
}

int launch_block_sums(const float* in, float* out, int blocks, int threads, void* stream) {
  return PK_LAUNCH(block_sums_kernel, blocks, threads, threads * sizeof(float), stream, in, out);
}

int launch_block_votes(const int* in, int* out, int threads, void* stream) {
  return PK_LAUNCH(block_votes_kernel, 1, threads, 0, stream, in, out);
}

int launch_shuffles(const double* in, double* out, const int* in_int, int* out_int, int argument, int width, void* stream) {
  const int status = PK_LAUNCH((shuffles_kernel<double>), 1, 32, 0, stream, in, out, argument, width);
  return status != 0 ? status : PK_LAUNCH((shuffles_kernel<int>), 1, 32, 0, stream, in_int, out_int, argument, width);
}

int launch_votes(const int* in, unsigned* out, unsigned mask, void* stream) {
  return PK_LAUNCH(votes_kernel, 1, 32, 0, stream, in, out, mask);
}

int launch_atomics(const int* in, int size, int bins, int* counts, float* sum_float, double* sum_double, int* extremes,
                   unsigned* compare_swap_sum, unsigned* tickets, void* stream) {
  return PK_LAUNCH(atomics_kernel, (size + 127) / 128, 128, 0, stream, in, size, bins, counts, sum_float, sum_double, extremes,
                   compare_swap_sum, tickets);
}

int launch_pipeline(const float* in, float* out, int rows, int columns, int width, void* stream) {
  return PK_LAUNCH(pipeline_kernel, (columns + 63) / 64, 64, 0, stream, in, out, rows, columns, width);
}

int launch_mma(const float* a, const float* b, float* out, int depth, MmaKind kind, void* stream) {
  return PK_LAUNCH(mma_kernel, 1, 32, 0, stream, a, b, out, depth, kind);
}

int launch_rounding(const float* in, unsigned* tf32, std::uint16_t* bf16, std::uint16_t* half, float* back, int size, void* stream) {
  return PK_LAUNCH(rounding_kernel, (size + 127) / 128, 128, 0, stream, in, tf32, reinterpret_cast<__nv_bfloat16*>(bf16),
                   reinterpret_cast<__half*>(half), back, size);
}

int launch_powers(const float* in, float* out, int size, void* stream) {
  return PK_LAUNCH(powers_kernel, (size + 127) / 128, 128, 0, stream, in, out, size);
}

int launch_vector_copy(const float* in, float* out, int size, void* stream) {
  return PK_LAUNCH(vector_copy_kernel, (size / 4 + 63) / 64, 64, 0, stream, in, out, size / 4);
}

int launch_last_block_sum(const float* in, float* partial, unsigned* counter, float* out, int blocks, void* stream) {
  return PK_LAUNCH(last_block_sum_kernel, blocks, 64, 0, stream, in, partial, counter, out);
}

int launch_warp_exchange(const float* in, float* out, int threads, void* stream) {
  return PK_LAUNCH(warp_exchange_kernel, 1, threads, 0, stream, in, out);
}

int launch_half_rotate(const float* in, float* out, int threads, void* stream) {
  return PK_LAUNCH(half_rotate_kernel, 1, threads, 0, stream, in, out);
}

int launch_workload(const float* in, float* out, int blocks, int threads, int rounds, void* stream) {
  return PK_LAUNCH(workload_kernel, blocks, threads, threads * sizeof(float), stream, in, out, rounds);
}

int launch_probe(int* out, int grid_x, int grid_y, int block_x, int block_z, std::size_t dynamic_shared_bytes, void* stream) {
  return PK_LAUNCH(probe_kernel, dim3(grid_x, grid_y), dim3(block_x, 1, block_z), dynamic_shared_bytes, stream, out,
                   static_cast<int>(dynamic_shared_bytes / sizeof(float)));
}
