// Checks and allocation of tensors through the stable ABI of LibTorch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/problem.h"

namespace adapter_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What to call a tensor in an error: the op, the argument, and where it is a list the position.
struct ArgumentName {
  const char* op;
  const char* argument;
  int64_t index = -1;
};

template <class... Parts>
std::string concatenate(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(const ArgumentName& name, const Parts&... message) {
  const std::string index = name.index < 0 ? "" : concatenate("[", name.index, "]");
  throw std::runtime_error(
      concatenate(name.op, ": ", name.argument, index, ": ", concatenate(message...)));
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

inline const char* type_text(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::ComplexFloat: return "complex64";
    default: return "another type";
  }
}

inline int32_t device_type(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

inline bool is_cuda(const Tensor& tensor) {
  return device_type(tensor) == aoti_torch_device_type_cuda();
}

struct Device {
  int32_t type, index;

  bool operator==(const Device&) const = default;
};

inline Device device(const Tensor& tensor) {
  return {device_type(tensor), static_cast<int32_t>(tensor.get_device_index())};
}

inline std::string device_text(const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  const bool cuda = device.type == aoti_torch_device_type_cuda();
  return concatenate(cuda ? "cuda" : concatenate("device type ", device.type), ":", device.index);
}

inline void check_device(const ArgumentName& name, const Tensor& tensor, const Device& expected) {
  if (device(tensor) != expected) {
    fail(name, "expected a tensor on the device of x, ", device_text(expected), ", got one on ",
         device_text(device(tensor)));
  }
}

inline void check_type(const ArgumentName& name, const Tensor& tensor,
                       std::initializer_list<ScalarType> allowed) {
  const ScalarType type = tensor.scalar_type();
  for (const ScalarType option : allowed) {
    if (type == option) return;
  }
  std::string expected;
  for (const ScalarType option : allowed) {
    expected += concatenate(expected.empty() ? "" : " or ", type_text(option));
  }
  fail(name, "expected dtype ", expected, ", got ", type_text(type));
}

// Checks the shape; a size of -1 stands for any.
inline void check_shape(const ArgumentName& name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && (size < 0 || tensor.size(i++) == size);
  if (same) return;
  std::ostringstream expected;
  i = 0;
  for (const int64_t size : shape) {
    expected << (i++ ? ", " : "");
    size < 0 ? expected << "any" : expected << size;
  }
  fail(name, "expected shape [", expected.str(), "], got ", shape_text(tensor));
}

inline void check_contiguous(const ArgumentName& name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  std::ostringstream strides;
  for (int64_t i = 0; i < tensor.dim(); ++i) strides << (i ? ", " : "") << tensor.stride(i);
  fail(name, "expected a contiguous tensor, got shape ", shape_text(tensor), " with strides [",
       strides.str(), "]");
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int32_t type_code(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_int64();
  }
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), type_code(type),
      device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline DataType data_type(const ArgumentName& name, const Tensor& tensor) {
  check_type(name, tensor,
             {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DataType::kFloat64;
    case ScalarType::Float: return DataType::kFloat32;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    default: return DataType::kFloat16;
  }
}

}  // namespace adapter_ext
