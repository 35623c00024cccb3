// SPDX-License-Identifier: MIT
// Small kernels that test the emulator itself: right ones that must pass, and broken ones that must be caught.
// Every function returns a CUDA error number, 0 for success; `stream` is a cudaStream_t.
#pragma once

#include <cstddef>
#include <cstdint>

// ---- right kernels ----

// out[i] = a number made of the thread's block and thread index, for every thread of a 3-d grid of 3-d blocks.
int launch_places(int* out, int grid_x, int grid_y, int grid_z, int block_x, int block_y, int block_z, void* stream);
// out [columns, rows] = in [rows, columns], through a static tile; then scaled by a table in constant memory.
int launch_transpose(const float* in, float* out, int rows, int columns, const float* host_scale, void* stream);
// out[block] = sum of in over the block, through dynamic shared memory.
int launch_block_sums(const float* in, float* out, int blocks, int threads, void* stream);
// out [3, threads]: __syncthreads_count, _or, _and of in[thread] != 0.
int launch_block_votes(const int* in, int* out, int threads, void* stream);
// out [4, 32]: shuffle by index, up, down, exclusive or, with one argument and width; float64 and int32 at once.
int launch_shuffles(const double* in, double* out, const int* in_int, int* out_int, int argument, int width, void* stream);
// out [10, 32]: ballot, any, all, match_any, reduce add/min/max (signed), and, or, xor over the lanes named in mask.
int launch_votes(const int* in, unsigned* out, unsigned mask, void* stream);
// Atomic tour: counts [bins] of in [size], sum_float [1], sum_double [1], extremes [2] = minimum, maximum,
// product_like [1] by compare-and-swap, tickets [size] a permutation of 0..size-1.
int launch_atomics(const int* in, int size, int bins, int* counts, float* sum_float, double* sum_double, int* extremes,
                   unsigned* compare_swap_sum, unsigned* tickets, void* stream);
// out[column] = sum over rows of in [rows, columns], rows fetched two stages ahead by asynchronous copies of 4 * width bytes.
int launch_pipeline(const float* in, float* out, int rows, int columns, int width, void* stream);
// out [16, 8] = a [16, depth] b [depth, 8] on the tensor cores; depth a multiple of 8 (tf32) or 16 (bf16, f16).
enum class MmaKind { tf32, bf16, f16 };
int launch_mma(const float* a, const float* b, float* out, int depth, MmaKind kind, void* stream);
// Bits of the rounded values: tf32 [size], bf16 [size], half [size], and the floats they stand for [2, size].
int launch_rounding(const float* in, unsigned* tf32, std::uint16_t* bf16, std::uint16_t* half, float* back, int size, void* stream);
// out[i] = 2^in[i] by the fast instruction.
int launch_powers(const float* in, float* out, int size, void* stream);
// out = in, four floats at a time; 16-byte aligned pointers.
int launch_vector_copy(const float* in, float* out, int size, void* stream);
// out[0] = sum of in [blocks, 64]: the last block to finish adds the others' partial sums.
int launch_last_block_sum(const float* in, float* partial, unsigned* counter, float* out, int blocks, void* stream);
// out[i] = in[i ^ 1], exchanged through shared memory between __syncwarp.
int launch_warp_exchange(const float* in, float* out, int threads, void* stream);
// out[i] = in[(i + 1) % threads] as 16-bit halves in shared memory: neighbours write into one word.
int launch_half_rotate(const float* in, float* out, int threads, void* stream);
// Each thread: rounds of a warp sum by shuffles and a block exchange with two barriers. out [blocks * threads].
int launch_workload(const float* in, float* out, int blocks, int threads, int rounds, void* stream);
// out[block] = 3 (1 without dynamic memory), by way of 8 KB of static and the given dynamic shared memory. For launch errors.
int launch_probe(int* out, int grid_x, int grid_y, int block_x, int block_z, std::size_t dynamic_shared_bytes, void* stream);

// ---- broken kernels ----

enum class Mistake : int {
  missing_barrier,       // reads a neighbour's value with no barrier after the write
  read_before_write,     // sums one element more than was written to shared memory
  unwritten_output,      // leaves the last output untouched
  global_out_of_bounds,  // reads one element past the input
  global_write_out_of_bounds,
  shared_out_of_bounds,   // writes one element past a shared array
  divergent_barrier,      // two branches, one barrier in each
  return_before_barrier,  // half of the threads return, the others wait
  divergent_shuffle,      // a full-mask shuffle in a branch half of the warp takes
  foreign_mask,           // a shuffle whose mask does not name the caller
  copy_not_waited,        // reads the target of an asynchronous copy without waiting
  copy_without_barrier,   // waits for its own copies, reads a neighbour's without a barrier
  write_after_read,       // overwrites what another thread still reads, no barrier between
  write_write,            // two threads write one word
  missing_warp_barrier,   // exchanges through shared memory, ordered by a shuffle only
  misaligned_vector,      // float4 at an odd address
  misaligned_cast,        // the same through a raw pointer cast
  misaligned_copy,        // 16-byte asynchronous copy from an odd address
  unordered_blocks,       // reads another block's result without fence and atomic
  unpublished_block,      // fences, then announces its results by an atomic, with no barrier between
  modified_input,         // writes to its input
  spin_on_memory,         // polls a word that nobody writes
  spin_on_an_atomic,      // the same by an atomic operation
  grid_barrier,           // waits for a block that has not begun
  endless_loop,           // a loop whose step is 0
  endless_barriers,       // a loop of barriers whose vote never changes
  trap,
};

// out [threads] from in [threads]; 64 threads a block.
int launch_broken(Mistake mistake, float* in, float* out, int threads, void* stream);
