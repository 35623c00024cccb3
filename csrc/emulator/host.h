// SPDX-License-Identifier: MIT
// What a binding file csrc/emulator/bind_<op>.cpp needs: NumPy arrays as device buffers, and the module itself.
//
//     PK_EMULATOR_MODULE(module) {
//         module.def("scale", [](const py::object& x, const py::object& y, float factor) {
//             const Input<float> source(x, "x");        // copied to the device, read-only there
//             const Output<float> target(y, "y");       // copied there and back
//             check(launch_scale(source.data(), target.data(), source.size(), factor, nullptr));
//         });
//     }
//
// None becomes a null pointer. __half is NumPy's float16; __nv_bfloat16 is uint16, the bits.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/kind.h"
#include "emulator/half.h"
#include "emulator/memory.h"
#include "emulator/runtime.h"
#include "emulator/watchdog.h"

namespace pk::emulator {

namespace py = pybind11;

struct EmulatorError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Raises what the launch reported.
inline void check(int status) {
  const std::string report = take_report();
  if (status != 0) throw EmulatorError(report.empty() ? "the launch function returned error " + std::to_string(status) : report);
}

template <typename T>
py::dtype numpy_type() {
  if constexpr (std::is_same_v<T, __half>) {
    return py::dtype("float16");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return py::dtype("uint16");
  } else {
    return py::dtype::of<T>();
  }
}

template <typename T, bool writable>
class DeviceBuffer {
 public:
  DeviceBuffer(const py::object& object, const std::string& name) {
    if (object.is_none()) return;
    array_ = py::array::ensure(object);
    const bool is_array = py::isinstance<py::array>(object);
    const py::dtype expected = numpy_type<T>();
    if (!is_array || !array_.dtype().equal(expected) || (array_.flags() & py::array::c_style) == 0 || (writable && !array_.writeable())) {
      throw py::type_error("emulator: " + name + " must be a C-contiguous" + (writable ? ", writable" : "") + " NumPy array of " +
                           std::string(py::str(expected)) + "; got " +
                           (is_array
                                ? "an array of " + std::string(py::str(array_.dtype())) + " with flags " + std::to_string(array_.flags())
                                : std::string(py::str(py::type::of(object)))));
    }
    const auto bytes = static_cast<std::size_t>(array_.nbytes());
    pointer_ = static_cast<T*>(device_allocate(name, bytes, element_offset() * sizeof(T), writable));
    if (bytes > 0) std::memcpy(pointer_, array_.data(), bytes);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() {
    if (pointer_ == nullptr) return;
    if constexpr (writable) std::memcpy(array_.mutable_data(), pointer_, static_cast<std::size_t>(array_.nbytes()));
    device_free(pointer_);
  }

  using Element = std::conditional_t<writable, T, const T>;
  Element* data() const { return pointer_; }
  py::ssize_t size() const { return pointer_ == nullptr ? 0 : array_.size(); }
  py::ssize_t shape(py::ssize_t axis) const { return array_.shape(axis); }

 private:
  py::array array_;
  T* pointer_ = nullptr;
};

template <typename T>
using Input = DeviceBuffer<T, false>;
template <typename T>
using Output = DeviceBuffer<T, true>;
using Array = py::object;  // an argument: a NumPy array or None

template <typename T>
constexpr Kind kind_of = std::is_same_v<T, float>    ? Kind::f32
                         : std::is_same_v<T, double> ? Kind::f64
                         : std::is_same_v<T, __half> ? Kind::f16
                                                     : Kind::bf16;

// A workspace in poisoned device memory, as torch's empty() would hand it out.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : array_(std::vector<py::ssize_t>{static_cast<py::ssize_t>(bytes / 8 + 1)}), buffer_(poison(array_), "workspace") {}
  void* data() const { return buffer_.data(); }

 private:
  static py::array poison(py::array_t<double>& values) {
    std::fill_n(values.mutable_data(), values.size(), std::numeric_limits<double>::quiet_NaN());
    return values;
  }
  py::array_t<double> array_;
  Output<double> buffer_;
};

inline void bind_common(py::module_& module) {
  py::register_local_exception<EmulatorError>(module, "EmulatorError", PyExc_RuntimeError);
  module.def("configure", &configure, py::kw_only(), py::arg("seed") = 0, py::arg("architecture") = "sm_80", py::arg("element_offset") = 0,
             py::arg("block_seconds") = default_block_seconds,
             "Sets the seed of the thread and block order (0: natural order), the architecture whose limits hold, by how many "
             "elements buffers start after an aligned address, and how much processor time a block may take before it is stopped.");
}

}  // namespace pk::emulator

#define PK_EMULATOR_MODULE(variable)                 \
  static void pk_emulator_bind(pybind11::module_&);  \
  PYBIND11_MODULE(protokernels_emulator, variable) { \
    ::pk::emulator::bind_common(variable);           \
    pk_emulator_bind(variable);                      \
  }                                                  \
  static void pk_emulator_bind(pybind11::module_& variable)
