// Checks of `eri::layer_norm`, `eri::add_layer_norm` and `eri::layer_norm_backward`, the last two
// with a narrow product, too, and their CUDA implementation; the schemas are in
// eri/layers/layer_norm.py and eri/layers/narrow.py.

#include "layer_norm.h"

#include <optional>
#include <tuple>

#include "narrow_binding.h"
#include "op.h"

namespace eri {
namespace {

const Op op = {"layer_norm"};

// A row of the affine map.
const void* check_row(const char* name, const Tensor& found, const Tensor& x) {
  op.check_kind(name, found, x.get_device_index(), x.scalar_type());
  op.check_dense(name, found, x.size(-1));
  return found.const_data_ptr();
}

// All that follows from x and the weight.
LayerNormArguments arguments_of(const Tensor& x, const Tensor& weight, int64_t tail) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "layer_norm: x has no last dimension");
  LayerNormArguments arguments = {};
  arguments.type = op.float_type("x", x);
  arguments.width = x.size(-1);
  arguments.rows = x.numel() / x.size(-1);
  op.check_kind("x", x, x.get_device_index(), x.scalar_type());
  arguments.x_stride = op.check_rows("x", x, arguments.rows, arguments.width);
  arguments.weight = check_row("weight", weight, x);
  op.check_tail(tail, arguments.type);
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(arguments.width % vector == 0 && arguments.width <= vector * kLayerNormVectors,
                  "layer_norm: x has rows of ", arguments.width,
                  " elements, expected a multiple of ", vector, ", at most ",
                  vector * kLayerNormVectors);
  STD_TORCH_CHECK(arguments.rows < (1LL << 31), "layer_norm: x has ", arguments.rows, " rows");
  arguments.x = x.const_data_ptr();
  return arguments;
}

// Rows like those of x, at a stride of their own, which is returned.
int64_t check_like_x(const char* name, const Tensor& found, const Tensor& x,
                     const LayerNormArguments& arguments) {
  op.check_kind(name, found, x.get_device_index(), x.scalar_type());
  return op.check_rows(name, found, arguments.rows, arguments.width);
}

// What the kernels write, with a tail behind each row.
Tensor result_of(LayerNormArguments& arguments, const Tensor& x, int64_t tail) {
  arguments.result_stride = arguments.width + tail;
  Tensor result = torch::stable::new_empty(x, {arguments.rows, arguments.result_stride});
  arguments.result = result.mutable_data_ptr();
  return result;
}

std::tuple<Tensor, Tensor> forward(LayerNormArguments& arguments, const Tensor& x,
                                   const Tensor& bias, double eps, int64_t tail) {
  arguments.bias = check_row("bias", bias, x);
  arguments.eps = eps;
  Tensor n = result_of(arguments, x, tail);
  Tensor mean_rstd = torch::stable::new_empty(x, {arguments.rows, 2}, ScalarType::Float);
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  op.check_launch(launch_layer_norm(arguments, current_stream(x.get_device_index())));
  return {n, mean_rstd};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                      double eps, int64_t tail) {
  LayerNormArguments arguments = arguments_of(x, weight, tail);
  const DeviceGuard guard(x.get_device_index());
  return forward(arguments, x, bias, eps, tail);
}

std::tuple<Tensor, Tensor, Tensor> forward_of_sum(LayerNormArguments& arguments, const Tensor& x,
                                                  const Tensor& added, const Tensor& bias,
                                                  double eps, int64_t tail) {
  arguments.added_stride = check_like_x("added", added, x, arguments);
  arguments.added = added.const_data_ptr();
  Tensor sum = torch::stable::new_empty(x, {arguments.rows, arguments.width});
  arguments.sum = sum.mutable_data_ptr();
  auto [n, mean_rstd] = forward(arguments, x, bias, eps, tail);
  return {sum, n, mean_rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& added,
                                                  const Tensor& weight, const Tensor& bias,
                                                  double eps, int64_t tail) {
  LayerNormArguments arguments = arguments_of(x, weight, tail);
  const DeviceGuard guard(x.get_device_index());
  return forward_of_sum(arguments, x, added, bias, eps, tail);
}

// The same for a norm that a narrow product is made of; H.
Tensor narrow_of(LayerNormArguments& arguments, const Tensor& x, const Tensor& down,
                 double scale) {
  const int64_t most = vector_size(arguments.type) * kLayerNormNarrowVectors;
  STD_TORCH_CHECK(arguments.width <= most, "layer_norm: x has rows of ", arguments.width,
                  " elements, expected at most ", most, " with a narrow product");
  return check_narrow(op, arguments.narrow, down, scale, arguments.rows, arguments.width, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_narrow(
    const Tensor& x, const Tensor& added, const Tensor& weight, const Tensor& bias, double eps,
    const Tensor& down, double scale) {
  LayerNormArguments arguments = arguments_of(x, weight, 0);
  const DeviceGuard guard(x.get_device_index());
  Tensor h = narrow_of(arguments, x, down, scale);
  auto [sum, n, mean_rstd] =
      forward_of_sum(arguments, x, added, bias, eps, arguments.narrow.ranks);
  return {sum, n, mean_rstd, h};
}

std::tuple<Tensor, Tensor> backward(LayerNormArguments& arguments, const Tensor& dn,
                                    const Tensor& x, const Tensor& mean_rstd, const Tensor& bias,
                                    const std::optional<Tensor>& residual, int64_t tail) {
  arguments.bias = check_row("bias", bias, x);
  arguments.dn_stride = check_like_x("dn", dn, x, arguments);
  arguments.dn = dn.const_data_ptr();
  op.check_kind("mean_rstd", mean_rstd, x.get_device_index(), ScalarType::Float);
  op.check_dense("mean_rstd", mean_rstd, 2 * arguments.rows);
  if (residual) {
    arguments.residual_stride = check_like_x("residual", *residual, x, arguments);
    arguments.residual = residual->const_data_ptr();
  }
  Tensor dx = result_of(arguments, x, tail);
  Tensor n = torch::stable::new_empty(x, {arguments.rows, arguments.width});
  arguments.again = n.mutable_data_ptr();
  // the forward kernels alone write there
  arguments.mean_rstd = const_cast<float*>(static_cast<const float*>(mean_rstd.const_data_ptr()));
  op.check_launch(launch_layer_norm_backward(arguments, current_stream(x.get_device_index())));
  return {dx, n};
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& dn, const Tensor& x,
                                               const Tensor& mean_rstd, const Tensor& weight,
                                               const Tensor& bias,
                                               const std::optional<Tensor>& residual,
                                               int64_t tail) {
  LayerNormArguments arguments = arguments_of(x, weight, tail);
  const DeviceGuard guard(x.get_device_index());
  return backward(arguments, dn, x, mean_rstd, bias, residual, tail);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_narrow(
    const Tensor& dn, const Tensor& x, const Tensor& mean_rstd, const Tensor& weight,
    const Tensor& bias, const Tensor& residual, const Tensor& down, double scale) {
  LayerNormArguments arguments = arguments_of(x, weight, 0);
  const DeviceGuard guard(x.get_device_index());
  Tensor h = narrow_of(arguments, x, down, scale);
  auto [dx, n] =
      backward(arguments, dn, x, mean_rstd, bias, residual, arguments.narrow.ranks);
  return {dx, n, h};
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&eri::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&eri::add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&eri::layer_norm_backward));
  m.impl("add_layer_norm_narrow", TORCH_BOX(&eri::add_layer_norm_narrow));
  m.impl("layer_norm_backward_narrow", TORCH_BOX(&eri::layer_norm_backward_narrow));
}
