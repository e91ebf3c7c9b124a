// Checks of `eri::rope` and its CUDA implementation; the schema is in eri/layers/rope.py.

#include "rope.h"

#include "op.h"

namespace eri {
namespace {

const Op op = {"rope"};

// From one index to the next, in elements; of a single index nothing is asked.
int64_t stride_of(const Tensor& x, int64_t dimension, int64_t vector) {
  const int64_t stride = x.size(dimension) == 1 ? 0 : x.stride(dimension);
  STD_TORCH_CHECK(stride % vector == 0, "rope: dimension ", dimension, " of x has a stride of ",
                  stride, " elements, expected a multiple of ", vector);
  return stride;
}

Tensor rope(const Tensor& x, double base, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4, "rope: x has ", x.dim(), " dimensions, expected 4");
  RopeArguments arguments = {};
  arguments.type = op.float_type("x", x);
  op.check_kind("x", x, x.get_device_index(), x.scalar_type());
  op.check_aligned("x", x);
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(x.size(3) % vector == 0 && x.stride(3) == 1, "rope: x has heads of ", x.size(3),
                  " elements, expected a multiple of ", vector, ", without gaps");
  STD_TORCH_CHECK(x.size(2) < kRopePositions && x.size(2) * x.size(3) < kRopeElements,
                  "rope: x has ", x.size(2), " positions of ", x.size(3), " elements, too many");
  STD_TORCH_CHECK(x.size(0) * x.size(1) < kRopeElements, "rope: x has ", x.size(0) * x.size(1),
                  " sequences, too many");
  arguments.x = x.const_data_ptr();
  arguments.outer = x.size(0);
  arguments.inner = x.size(1);
  arguments.length = x.size(2);
  arguments.width = x.size(3);
  arguments.outer_stride = stride_of(x, 0, vector);
  arguments.inner_stride = stride_of(x, 1, vector);
  arguments.length_stride = stride_of(x, 2, vector);
  arguments.base = base;
  arguments.inverse = inverse;
  const DeviceGuard guard(x.get_device_index());
  Tensor result = torch::stable::new_empty(x, x.sizes());
  arguments.result = result.mutable_data_ptr();
  op.check_launch(launch_rope(arguments, current_stream(x.get_device_index())));
  return result;
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) { m.impl("rope", TORCH_BOX(&eri::rope)); }
