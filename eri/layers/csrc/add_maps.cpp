// Checks of `eri::add_maps_` and its CUDA implementation; the schema is in eri/layers/add_maps.py.

#include "add_maps.h"

#include <optional>

#include "op.h"

namespace eri {
namespace {

const Op op = {"add_maps"};

void add_maps(Tensor y, const std::optional<Tensor>& x, const Tensor& bias) {
  AddMapsArguments arguments = {};
  arguments.type = op.float_type("y", y);
  op.check_map("y", y, y);
  if (x) op.check_map("x", *x, y);
  const int64_t channels = y.size(1), vector = vector_size(arguments.type);
  op.check_kind("bias", bias, y.get_device_index(), y.scalar_type());
  op.check_dense("bias", bias, channels);
  STD_TORCH_CHECK(channels > 0 && channels % vector == 0, "add_maps: y has ", channels,
                  " channels, expected a multiple of ", vector);
  STD_TORCH_CHECK(y.numel() / vector < (1LL << 32), "add_maps: y has ", y.numel(), " elements");
  arguments.y = y.mutable_data_ptr();
  arguments.x = x ? x->const_data_ptr() : nullptr;
  arguments.bias = bias.const_data_ptr();
  arguments.pixels = y.numel() / channels;
  arguments.width = channels / vector;
  const DeviceGuard guard(y.get_device_index());
  op.check_launch(launch_add_maps(arguments, current_stream(y.get_device_index())));
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) { m.impl("add_maps_", TORCH_BOX(&eri::add_maps)); }
