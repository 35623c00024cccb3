// SPDX-License-Identifier: MIT
// The multiply-add peak of one thread, for measure.py: twelve independent chains keep every unit busy, and nothing touches memory.
// Compiled on the machine it measures (-march=native), because torch.mm is no ceiling where its BLAS does not use the widest vectors.
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12

typedef float vector __attribute__((vector_size(BYTES)));

// Runs `rounds` multiply-adds on every chain; returns the floating-point operations done.
double multiply_add(long rounds, float factor, float* result) {
  vector sum[CHAINS], total = {0};
  for (int i = 0; i < CHAINS; ++i) sum[i] = (vector){0} + (float)i;
  for (long n = 0; n < rounds; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sum[i] = sum[i] * factor + factor;
  for (int i = 0; i < CHAINS; ++i) total += sum[i];
  *result = total[0];
  return 2.0 * CHAINS * (BYTES / sizeof(float)) * (double)rounds;
}
