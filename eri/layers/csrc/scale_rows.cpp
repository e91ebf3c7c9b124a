// Checks of `eri::scale_rows` and `eri::scale_rows_backward` and their CUDA implementation; the
// schemas are in eri/layers/scale_rows.py.

#include "scale_rows.h"

#include <optional>
#include <tuple>

#include "op.h"

namespace eri {
namespace {

const Op op = {"scale_rows"};

// All that follows from x, its weight and eps.
ScaleRowsArguments arguments_of(const Tensor& x, const std::optional<Tensor>& weight,
                                const std::optional<double>& eps) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "scale_rows: x has no last dimension");
  ScaleRowsArguments arguments = {};
  arguments.type = op.float_type("x", x);
  arguments.width = x.size(-1);
  arguments.rows = x.numel() / x.size(-1);
  op.check_kind("x", x, x.get_device_index(), x.scalar_type());
  arguments.x_stride = op.check_rows("x", x, arguments.rows, arguments.width);
  arguments.x = x.const_data_ptr();
  if (weight) {
    op.check_kind("weight", *weight, x.get_device_index(), x.scalar_type());
    op.check_dense("weight", *weight, arguments.width);
    arguments.weight = weight->const_data_ptr();
  }
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(arguments.width % vector == 0 && arguments.width <= vector * kScaleRowsVectors,
                  "scale_rows: x has rows of ", arguments.width,
                  " elements, expected a multiple of ", vector, ", at most ",
                  vector * kScaleRowsVectors);
  STD_TORCH_CHECK(arguments.rows < (1LL << 31), "scale_rows: x has ", arguments.rows, " rows");
  arguments.norm = eps.has_value();
  arguments.eps = eps.value_or(0.0);
  return arguments;
}

Tensor scale_rows(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<double>& eps) {
  ScaleRowsArguments arguments = arguments_of(x, weight, eps);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  arguments.result = y.mutable_data_ptr();
  op.check_launch(launch_scale_rows(arguments, current_stream(x.get_device_index())));
  return y;
}

std::tuple<Tensor, Tensor> scale_rows_backward(const Tensor& dy, const Tensor& x,
                                               const std::optional<Tensor>& weight,
                                               const std::optional<double>& eps, bool of_weight) {
  ScaleRowsArguments arguments = arguments_of(x, weight, eps);
  op.check_kind("dy", dy, x.get_device_index(), x.scalar_type());
  arguments.dy_stride = op.check_rows("dy", dy, arguments.rows, arguments.width);
  arguments.dy = dy.const_data_ptr();
  STD_TORCH_CHECK(arguments.rows > 0, "scale_rows: x has no rows");
  const DeviceGuard guard(x.get_device_index());
  const int64_t count = of_weight ? scale_rows_parts(arguments) : 0;
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor of_rows = torch::stable::new_empty(x, {of_weight ? arguments.width : 0});
  Tensor parts = torch::stable::new_empty(x, {count, arguments.width}, ScalarType::Float);
  arguments.result = dx.mutable_data_ptr();
  if (of_weight) {
    arguments.weight_gradient = of_rows.mutable_data_ptr();
    arguments.parts = static_cast<float*>(parts.mutable_data_ptr());
  }
  op.check_launch(launch_scale_rows(arguments, current_stream(x.get_device_index())));
  return {dx, of_rows};
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("scale_rows", TORCH_BOX(&eri::scale_rows));
  m.impl("scale_rows_backward", TORCH_BOX(&eri::scale_rows_backward));
}
