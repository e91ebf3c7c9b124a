// Checks of `eri::group_norm_silu` and `eri::group_norm_silu_backward` and their CUDA
// implementation; the schemas are in eri/layers/group_norm_silu.py.

#include "group_norm_silu.h"

#include <numeric>
#include <optional>
#include <tuple>

#include "op.h"

namespace eri {
namespace {

const Op op = {"group_norm_silu"};

void check_row(const char* name, const Tensor& row, const Tensor& x) {
  op.check_kind(name, row, x.get_device_index(), x.scalar_type());
  STD_TORCH_CHECK(row.dim() == 1 && row.size(0) == x.size(1) && row.is_contiguous(),
                  "group_norm_silu: ", name, " is not [C], contiguous");
}

// All that follows from what both passes read; the other tensors are left to the caller.
GroupNormArguments arguments_of(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                int64_t groups, bool silu, const std::optional<Tensor>& added) {
  op.check_map("x", x, x);
  check_row("weight", weight, x);
  check_row("bias", bias, x);
  GroupNormArguments arguments = {};
  arguments.x = x.const_data_ptr();
  arguments.weight = weight.const_data_ptr();
  arguments.bias = bias.const_data_ptr();
  arguments.type = op.float_type("x", x);
  arguments.samples = x.size(0);
  arguments.channels = x.size(1);
  arguments.pixels = x.size(2) * x.size(3);
  arguments.groups = groups;
  arguments.silu = silu;
  const int64_t vector = vector_size(arguments.type);
  const int64_t channels = arguments.channels;
  STD_TORCH_CHECK(x.numel() > 0 && groups > 0 && channels % groups == 0 && channels % vector == 0,
                  "group_norm_silu: ", channels, " channels in ", groups,
                  " groups, expected a multiple of the groups and of ", vector, ", and no empty x");
  STD_TORCH_CHECK(std::lcm(channels / groups, vector) <= kGroupNormVectors * vector,
                  "group_norm_silu: groups of ", channels / groups, " channels are too wide");
  STD_TORCH_CHECK(arguments.samples <= kGroupNormSamples &&
                      arguments.samples * groups < kGroupNormSample &&
                      arguments.pixels * channels < kGroupNormSample,
                  "group_norm_silu: x is too large");
  if (added) {
    op.check_kind("added", *added, x.get_device_index(), x.scalar_type());
    arguments.added_stride = op.check_rows("added", *added, arguments.samples, channels);
    arguments.added = added->const_data_ptr();
  }
  return arguments;
}

Tensor workspace_of(const GroupNormArguments& arguments, const Tensor& x) {
  return torch::stable::new_empty(x, {group_norm_workspace(arguments)}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, int64_t groups, double eps,
                                           bool silu, const std::optional<Tensor>& added) {
  GroupNormArguments arguments = arguments_of(x, weight, bias, groups, silu, added);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  Tensor mean_rstd = torch::stable::new_empty(x, {x.size(0), groups, 2}, ScalarType::Float);
  Tensor workspace = workspace_of(arguments, x);
  arguments.result = y.mutable_data_ptr();
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  arguments.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  arguments.eps = eps;
  op.check_launch(launch_group_norm(arguments, current_stream(x.get_device_index())));
  return {y, mean_rstd};
}

Tensor group_norm_silu_backward(const Tensor& dy, const Tensor& x, const Tensor& mean_rstd,
                                const Tensor& weight, const Tensor& bias, int64_t groups,
                                bool silu, const std::optional<Tensor>& added,
                                const std::optional<Tensor>& plus) {
  GroupNormArguments arguments = arguments_of(x, weight, bias, groups, silu, added);
  op.check_map("dy", dy, x);
  if (plus) {
    op.check_map("plus", *plus, x);
    arguments.plus = plus->const_data_ptr();
  }
  op.check_kind("mean_rstd", mean_rstd, x.get_device_index(), ScalarType::Float);
  op.check_dense("mean_rstd", mean_rstd, 2 * x.size(0) * groups);
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x);
  Tensor workspace = workspace_of(arguments, x);
  arguments.dy = dy.const_data_ptr();
  arguments.result = dx.mutable_data_ptr();
  arguments.mean_rstd = static_cast<float*>(mean_rstd.mutable_data_ptr());
  arguments.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  op.check_launch(launch_group_norm_backward(arguments, current_stream(x.get_device_index())));
  return dx;
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&eri::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&eri::group_norm_silu_backward));
}
