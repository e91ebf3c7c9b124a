// Checks of `eri::geglu` and `eri::geglu_backward` and their CUDA implementation; the schemas are
// in eri/layers/geglu.py.

#include "geglu.h"

#include <tuple>

#include "op.h"

namespace eri {
namespace {

const Op op = {"geglu"};

// All that follows from u; `da` and `result` are left to the caller.
GegluArguments arguments_of(const Tensor& u, int64_t tail) {
  STD_TORCH_CHECK(u.dim() > 0 && u.size(-1) > 0, "geglu: u has no last dimension");
  GegluArguments arguments = {};
  arguments.u = u.const_data_ptr();
  arguments.type = op.float_type("u", u);
  arguments.width = u.size(-1) / 2;
  arguments.rows = u.numel() / u.size(-1);
  op.check_kind("u", u, u.get_device_index(), u.scalar_type());
  arguments.u_stride = op.check_rows("u", u, arguments.rows, u.size(-1));
  op.check_tail(tail, arguments.type);
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(u.size(-1) % (2 * vector) == 0, "geglu: the last dimension of u is ", u.size(-1),
                  ", expected a multiple of ", 2 * vector);
  STD_TORCH_CHECK(u.numel() < kGegluElements, "geglu: u has ", u.numel(),
                  " elements, expected fewer than ", kGegluElements);
  return arguments;
}

// Rows of a width and a tail behind each, for the kernel to write.
Tensor result_of(GegluArguments& arguments, const Tensor& u, int64_t width, int64_t tail) {
  Tensor result = torch::stable::new_empty(u, {arguments.rows, width + tail});
  arguments.result = result.mutable_data_ptr();
  arguments.result_stride = width + tail;
  return result;
}

Tensor geglu(const Tensor& u, int64_t tail) {
  GegluArguments arguments = arguments_of(u, tail);
  const DeviceGuard guard(u.get_device_index());
  Tensor a = result_of(arguments, u, arguments.width, tail);
  op.check_launch(launch_geglu(arguments, current_stream(u.get_device_index())));
  return a;
}

std::tuple<Tensor, Tensor> geglu_backward(const Tensor& da, const Tensor& u, int64_t tail) {
  GegluArguments arguments = arguments_of(u, tail);
  op.check_kind("da", da, u.get_device_index(), u.scalar_type());
  arguments.da_stride = op.check_rows("da", da, arguments.rows, arguments.width);
  arguments.da = da.const_data_ptr();
  const DeviceGuard guard(u.get_device_index());
  Tensor du = result_of(arguments, u, 2 * arguments.width, tail);
  Tensor a = torch::stable::new_empty(u, {arguments.rows, arguments.width});
  arguments.again = a.mutable_data_ptr();
  op.check_launch(launch_geglu_backward(arguments, current_stream(u.get_device_index())));
  return {du, a};
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("geglu", TORCH_BOX(&eri::geglu));
  m.impl("geglu_backward", TORCH_BOX(&eri::geglu_backward));
}
