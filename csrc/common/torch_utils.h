// SPDX-License-Identifier: MIT
// What every op's torch side needs: kinds, allocation, row strides, the CUDA stream. Only the LibTorch Stable ABI is used.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/kind.h"
#include "common/parallel.h"

namespace protokernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Kind kind_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::Double: return Kind::f64;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Half: return Kind::f16;
    default: STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

// The tensor, copied only if it is not contiguous; torch::stable::contiguous looks its operator up by name before it finds that out.
inline Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// A matrix whose rows are dense; copied only if they are not.
inline Tensor with_dense_rows(const Tensor& matrix) {
  return matrix.stride(1) == 1 || matrix.size(1) <= 1 ? matrix : as_contiguous(matrix);
}

// An uninitialised tensor on the device of like. Large ones on the CPU ask the kernel for huge pages: a fresh 64 MB output otherwise costs
// 16,384 page faults, as long as the arithmetic that fills it.
Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// The stream torch works on at the moment. Only on a CUDA torch.
void* current_cuda_stream(const Tensor& tensor);
// Raises what the CUDA runtime says; status 0 is success.
void check_cuda(int status, const char* what);

}  // namespace protokernels
