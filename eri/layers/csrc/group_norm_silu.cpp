// Checks of `eri::group_norm_silu` and `eri::group_norm_silu_backward` and their CUDA
// implementation; the schemas are in eri/layers/group_norm_silu.py.

#include "group_norm_silu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <numeric>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

eri::GroupNormType type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "group_norm_silu: x is of type ", type, ", expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return eri::GroupNormType::kFloat;
  return type == ScalarType::Half ? eri::GroupNormType::kHalf : eri::GroupNormType::kBFloat16;
}

// Pixel by pixel, without gaps; strides of dimensions of size 1 say nothing.
bool is_channels_last(const Tensor& map) {
  const int64_t c = map.size(1), h = map.size(2), w = map.size(3);
  const std::array<int64_t, 4> strides = {h * w * c, 1, w * c, c};
  for (int64_t i = 0; i < 4; ++i) {
    if (map.size(i) != 1 && map.stride(i) != strides[i]) return false;
  }
  return true;
}

void check_map(const char* name, const Tensor& map, const Tensor& x) {
  STD_TORCH_CHECK(map.is_cuda() && map.get_device_index() == x.get_device_index() &&
                      map.scalar_type() == x.scalar_type(),
                  "group_norm_silu: ", name, " is not on the CUDA device and of the type of x");
  STD_TORCH_CHECK(map.dim() == 4 && is_channels_last(map), "group_norm_silu: ", name,
                  " is not [B, C, H, W] in channels_last");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(map.const_data_ptr()) % 16 == 0,
                  "group_norm_silu: ", name, " does not begin at a multiple of 16 bytes");
}

void check_row(const char* name, const Tensor& row, const Tensor& x) {
  STD_TORCH_CHECK(row.is_cuda() && row.get_device_index() == x.get_device_index() &&
                      row.scalar_type() == x.scalar_type() && row.dim() == 1 &&
                      row.size(0) == x.size(1) && row.is_contiguous(),
                  "group_norm_silu: ", name, " is not [C] on the device and of the type of x");
}

// All that follows from the input; the other tensors are left to the caller.
eri::GroupNormArguments arguments_of(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                     int64_t groups, bool silu) {
  check_map("x", x, x);
  check_row("weight", weight, x);
  check_row("bias", bias, x);
  eri::GroupNormArguments arguments = {};
  arguments.x = x.const_data_ptr();
  arguments.weight = weight.const_data_ptr();
  arguments.bias = bias.const_data_ptr();
  arguments.type = type_of(x);
  arguments.samples = x.size(0);
  arguments.channels = x.size(1);
  arguments.pixels = x.size(2) * x.size(3);
  arguments.groups = groups;
  arguments.silu = silu;
  const int64_t vector = arguments.type == eri::GroupNormType::kFloat ? 4 : 8;
  const int64_t channels = arguments.channels;
  STD_TORCH_CHECK(x.numel() > 0 && groups > 0 && channels % groups == 0 && channels % vector == 0,
                  "group_norm_silu: ", channels, " channels in ", groups,
                  " groups, expected a multiple of the groups and of ", vector, ", and no empty x");
  STD_TORCH_CHECK(std::lcm(channels / groups, vector) <= eri::kGroupNormVectors * vector,
                  "group_norm_silu: groups of ", channels / groups, " channels are too wide");
  STD_TORCH_CHECK(arguments.samples <= eri::kGroupNormSamples &&
                      arguments.pixels * channels < eri::kGroupNormSample,
                  "group_norm_silu: x is too large");
  return arguments;
}

Tensor workspace_of(const eri::GroupNormArguments& arguments, const Tensor& x) {
  return torch::stable::new_empty(x, {eri::group_norm_workspace(arguments)}, ScalarType::Float);
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, int64_t groups, double eps,
                                           bool silu) {
  eri::GroupNormArguments arguments = arguments_of(x, weight, bias, groups, silu);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  Tensor mean_rstd = torch::stable::new_empty(x, {x.size(0), groups, 2}, ScalarType::Float);
  Tensor workspace = workspace_of(arguments, x);
  arguments.result = y.mutable_data_ptr();
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  arguments.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  arguments.eps = eps;
  const char* error = eri::launch_group_norm(arguments, current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "group_norm_silu: CUDA says: ", error);
  return {y, mean_rstd};
}

Tensor group_norm_silu_backward(const Tensor& dy, const Tensor& x, const Tensor& mean_rstd,
                                const Tensor& weight, const Tensor& bias, int64_t groups,
                                bool silu) {
  eri::GroupNormArguments arguments = arguments_of(x, weight, bias, groups, silu);
  check_map("dy", dy, x);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(1) == x.size(1) && dy.size(2) == x.size(2) &&
                      dy.size(3) == x.size(3),
                  "group_norm_silu_backward: dy is not of the shape of x");
  STD_TORCH_CHECK(mean_rstd.is_cuda() && mean_rstd.get_device_index() == x.get_device_index() &&
                      mean_rstd.scalar_type() == ScalarType::Float && mean_rstd.is_contiguous() &&
                      mean_rstd.numel() == 2 * x.size(0) * groups,
                  "group_norm_silu_backward: mean_rstd is not float32 [B, groups, 2] beside x");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  Tensor workspace = workspace_of(arguments, x);
  arguments.dy = dy.const_data_ptr();
  arguments.result = dx.mutable_data_ptr();
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  arguments.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  const char* error = eri::launch_group_norm_backward(arguments, current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "group_norm_silu_backward: CUDA says: ", error);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}
