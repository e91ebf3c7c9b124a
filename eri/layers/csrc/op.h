// What the bindings of all ops share: checks whose messages name op and tensor, and the stream.
//
// Only PyTorch's stable ABI is used, so one build serves several versions of PyTorch and Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>

#include "float_type.h"

namespace eri {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Of a map [B, C, H, W]: pixel by pixel, without gaps; strides of dimensions of size 1 say nothing.
inline bool is_channels_last(const Tensor& map) {
  const int64_t c = map.size(1), h = map.size(2), w = map.size(3);
  const std::array<int64_t, 4> strides = {h * w * c, 1, w * c, c};
  for (int64_t i = 0; i < 4; ++i) {
    if (map.size(i) != 1 && map.stride(i) != strides[i]) return false;
  }
  return true;
}

struct Op {
  const char* name;  // with which every message begins

  FloatType float_type(const char* tensor, const Tensor& found) const {
    const ScalarType type = found.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
        ": ", tensor, " is of type ", type, ", expected float32, float16 or bfloat16");
    if (type == ScalarType::Float) return FloatType::kFloat;
    return type == ScalarType::Half ? FloatType::kHalf : FloatType::kBFloat16;
  }

  // On one CUDA device and of one type.
  void check_kind(const char* tensor, const Tensor& found, int32_t device, ScalarType type) const {
    STD_TORCH_CHECK(found.is_cuda() && found.get_device_index() == device, name, ": ", tensor,
                    " is not on cuda:", device);
    STD_TORCH_CHECK(found.scalar_type() == type, name, ": ", tensor, " is of type ",
                    found.scalar_type(), ", expected ", type);
  }

  // Numbers that a thread can read 16 bytes at a time.
  void check_aligned(const char* tensor, const Tensor& found) const {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 16 == 0, name, ": ",
                    tensor, " does not begin at a multiple of 16 bytes");
  }

  // So many numbers without gaps, aligned.
  void check_dense(const char* tensor, const Tensor& found, int64_t numbers) const {
    STD_TORCH_CHECK(found.is_contiguous() && found.numel() == numbers, name, ": ", tensor, " has ",
                    found.numel(), " elements, expected ", numbers, ", and contiguous ones");
    check_aligned(tensor, found);
  }

  // Rows [..., width] at one stride, aligned each; the elements from one to the next.
  int64_t check_rows(const char* tensor, const Tensor& found, int64_t rows, int64_t width) const {
    const int64_t last = found.dim() - 1;
    STD_TORCH_CHECK(last >= 0 && found.size(last) == width && found.numel() == rows * width, name,
                    ": ", tensor, " has ", found.numel(), " elements, expected ", rows, " rows of ",
                    width);
    int64_t stride = width, count = 1;  // of the dimensions seen, as rows
    bool regular = width == 1 || found.stride(last) == 1;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (found.size(i) == 1) continue;  // its stride says nothing
      if (count == 1) stride = found.stride(i);
      regular = regular && found.stride(i) == stride * count;
      count *= found.size(i);
    }
    STD_TORCH_CHECK(regular && stride % vector_size(float_type(tensor, found)) == 0, name, ": ",
                    tensor, " has no rows at one stride, a multiple of 16 bytes");
    check_aligned(tensor, found);
    return stride;
  }

  // A map [B, C, H, W] of the kind and shape of another, pixel by pixel without gaps, aligned.
  void check_map(const char* tensor, const Tensor& found, const Tensor& like) const {
    check_kind(tensor, found, like.get_device_index(), like.scalar_type());
    STD_TORCH_CHECK(found.dim() == 4 && is_channels_last(found), name, ": ", tensor,
                    " is not [B, C, H, W] in channels_last");
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(found.size(i) == like.size(i), name, ": ", tensor, " has ", found.size(i),
                      " elements in dimension ", i, ", expected ", like.size(i));
    }
    check_aligned(tensor, found);
  }

  // Behind each row of a result: left as memory had it.
  void check_tail(int64_t tail, FloatType type) const {
    STD_TORCH_CHECK(tail >= 0 && tail % vector_size(type) == 0, name, ": tail is ", tail,
                    " elements, expected a multiple of ", vector_size(type));
  }

  // The launchers' answer.
  void check_launch(const char* error) const {
    STD_TORCH_CHECK(error == nullptr, name, ": CUDA says: ", error);
  }
};

// A cudaStream_t: the one that PyTorch queues on for a device.
inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace eri
