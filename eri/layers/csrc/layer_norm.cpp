// Checks of `eri::layer_norm` and `eri::layer_norm_backward` and their CUDA implementation; the
// schemas are in eri/layers/layer_norm.py.

#include "layer_norm.h"

#include <optional>
#include <tuple>
#include <vector>

#include "op.h"

namespace eri {
namespace {

const Op op = {"layer_norm"};

// So many numbers beside x, contiguous.
void check(const char* name, const Tensor& found, const Tensor& x, ScalarType type,
           int64_t numbers) {
  op.check_kind(name, found, x.get_device_index(), type);
  op.check_dense(name, found, numbers);
}

// All that follows from x and the weight.
LayerNormArguments arguments_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "layer_norm: x has no last dimension");
  LayerNormArguments arguments = {};
  arguments.type = op.float_type("x", x);
  arguments.width = x.size(-1);
  arguments.rows = x.numel() / x.size(-1);
  check("x", x, x, x.scalar_type(), x.numel());
  check("weight", weight, x, x.scalar_type(), x.size(-1));
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(
      arguments.width % vector == 0 && arguments.width <= vector * kLayerNormVectors,
      "layer_norm: x has rows of ", arguments.width, " elements, expected a multiple of ", vector,
      ", at most ", vector * kLayerNormVectors);
  STD_TORCH_CHECK(arguments.rows < (1LL << 31), "layer_norm: x has ", arguments.rows, " rows");
  arguments.x = x.const_data_ptr();
  arguments.weight = weight.const_data_ptr();
  return arguments;
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps) {
  LayerNormArguments arguments = arguments_of(x, weight);
  check("bias", bias, x, x.scalar_type(), x.size(-1));
  const DeviceGuard guard(x.get_device_index());
  Tensor n = torch::stable::empty_like(x);
  const std::vector<int64_t> sizes = {arguments.rows, 2};
  Tensor mean_rstd = torch::stable::new_empty(x, sizes, ScalarType::Float);
  arguments.bias = bias.const_data_ptr();
  arguments.eps = eps;
  arguments.result = n.mutable_data_ptr();
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  op.check_launch(launch_layer_norm(arguments, current_stream(x.get_device_index())));
  return {n, mean_rstd};
}

Tensor layer_norm_backward(const Tensor& dn, const Tensor& x, const Tensor& mean_rstd,
                           const Tensor& weight, const std::optional<Tensor>& residual) {
  LayerNormArguments arguments = arguments_of(x, weight);
  check("dn", dn, x, x.scalar_type(), x.numel());
  check("mean_rstd", mean_rstd, x, ScalarType::Float, 2 * arguments.rows);
  if (residual) {
    check("residual", *residual, x, x.scalar_type(), x.numel());
    arguments.residual = residual->const_data_ptr();
  }
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  arguments.dn = dn.const_data_ptr();
  arguments.result = dx.mutable_data_ptr();
  // the forward kernel alone writes there
  arguments.mean_rstd = const_cast<float*>(static_cast<const float*>(mean_rstd.const_data_ptr()));
  op.check_launch(launch_layer_norm_backward(arguments, current_stream(x.get_device_index())));
  return dx;
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&eri::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&eri::layer_norm_backward));
}
