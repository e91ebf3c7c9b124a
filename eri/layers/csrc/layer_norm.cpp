// Checks of `eri::layer_norm` and `eri::layer_norm_backward` and their CUDA implementation; the
// schemas are in eri/layers/layer_norm.py.

#include "layer_norm.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

eri::LayerNormType type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "layer_norm: x is of type ", type, ", expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return eri::LayerNormType::kFloat;
  return type == ScalarType::Half ? eri::LayerNormType::kHalf : eri::LayerNormType::kBFloat16;
}

void check(const char* name, const Tensor& found, const Tensor& x, ScalarType type,
           int64_t numbers) {
  STD_TORCH_CHECK(found.is_cuda() && found.get_device_index() == x.get_device_index() &&
                      found.is_contiguous(),
                  "layer_norm: ", name, " is not contiguous on the CUDA device of x");
  STD_TORCH_CHECK(found.scalar_type() == type && found.numel() == numbers, "layer_norm: ", name,
                  " has ", found.numel(), " elements of type ", found.scalar_type(), ", expected ",
                  numbers, " of ", type);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 16 == 0, "layer_norm: ",
                  name, " does not begin at a multiple of 16 bytes");
}

// All that follows from x and the weight.
eri::LayerNormArguments arguments_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "layer_norm: x has no last dimension");
  eri::LayerNormArguments arguments = {};
  arguments.type = type_of(x);
  arguments.width = x.size(-1);
  arguments.rows = x.numel() / x.size(-1);
  check("x", x, x, x.scalar_type(), x.numel());
  check("weight", weight, x, x.scalar_type(), x.size(-1));
  const int64_t vector = arguments.type == eri::LayerNormType::kFloat ? 4 : 8;
  STD_TORCH_CHECK(
      arguments.width % vector == 0 && arguments.width <= vector * eri::kLayerNormVectors,
      "layer_norm: x has rows of ", arguments.width, " elements, expected a multiple of ", vector,
      ", at most ", vector * eri::kLayerNormVectors);
  STD_TORCH_CHECK(arguments.rows < (1LL << 31), "layer_norm: x has ", arguments.rows, " rows");
  arguments.x = x.const_data_ptr();
  arguments.weight = weight.const_data_ptr();
  return arguments;
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps) {
  eri::LayerNormArguments arguments = arguments_of(x, weight);
  check("bias", bias, x, x.scalar_type(), x.size(-1));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor n = torch::stable::empty_like(x);
  const std::vector<int64_t> sizes = {arguments.rows, 2};
  Tensor mean_rstd = torch::stable::new_empty(x, sizes, ScalarType::Float);
  arguments.bias = bias.const_data_ptr();
  arguments.eps = eps;
  arguments.result = n.mutable_data_ptr();
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  const char* error = eri::launch_layer_norm(arguments, current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "layer_norm: CUDA says: ", error);
  return {n, mean_rstd};
}

Tensor layer_norm_backward(const Tensor& dn, const Tensor& x, const Tensor& mean_rstd,
                           const Tensor& weight, const std::optional<Tensor>& residual) {
  eri::LayerNormArguments arguments = arguments_of(x, weight);
  check("dn", dn, x, x.scalar_type(), x.numel());
  check("mean_rstd", mean_rstd, x, ScalarType::Float, 2 * arguments.rows);
  if (residual) {
    check("residual", *residual, x, x.scalar_type(), x.numel());
    arguments.residual = residual->const_data_ptr();
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  arguments.dn = dn.const_data_ptr();
  arguments.result = dx.mutable_data_ptr();
  // the forward kernel alone writes there
  arguments.mean_rstd = const_cast<float*>(static_cast<const float*>(mean_rstd.const_data_ptr()));
  const char* error = eri::launch_layer_norm_backward(arguments, current_stream(x));
  STD_TORCH_CHECK(error == nullptr, "layer_norm_backward: CUDA says: ", error);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}
