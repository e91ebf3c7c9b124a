// Checks of `eri::geglu` and `eri::geglu_backward` and their CUDA implementation; the schemas are
// in eri/layers/geglu.py.

#include "geglu.h"

#include <vector>

#include "op.h"

namespace eri {
namespace {

const Op op = {"geglu"};

// All that follows from u; `da` and `result` are left to the caller.
GegluArguments arguments_of(const Tensor& u) {
  STD_TORCH_CHECK(u.dim() > 0 && u.size(-1) > 0, "geglu: u has no last dimension");
  GegluArguments arguments = {};
  arguments.u = u.const_data_ptr();
  arguments.type = op.float_type("u", u);
  op.check_kind("u", u, u.get_device_index(), u.scalar_type());
  op.check_dense("u", u, u.numel());
  arguments.width = u.size(-1) / 2;
  arguments.rows = u.numel() / u.size(-1);
  const int64_t vector = vector_size(arguments.type);
  STD_TORCH_CHECK(u.size(-1) % (2 * vector) == 0, "geglu: the last dimension of u is ", u.size(-1),
                  ", expected a multiple of ", 2 * vector);
  STD_TORCH_CHECK(u.numel() < kGegluElements, "geglu: u has ", u.numel(),
                  " elements, expected fewer than ", kGegluElements);
  return arguments;
}

Tensor geglu(const Tensor& u) {
  GegluArguments arguments = arguments_of(u);
  const DeviceGuard guard(u.get_device_index());
  const auto of_u = u.sizes();
  std::vector<int64_t> sizes(of_u.begin(), of_u.end());
  sizes.back() = arguments.width;
  Tensor a = torch::stable::new_empty(u, sizes);
  arguments.result = a.mutable_data_ptr();
  op.check_launch(launch_geglu(arguments, current_stream(u.get_device_index())));
  return a;
}

Tensor geglu_backward(const Tensor& da, const Tensor& u) {
  GegluArguments arguments = arguments_of(u);
  op.check_kind("da", da, u.get_device_index(), u.scalar_type());
  op.check_dense("da", da, u.numel() / 2);
  STD_TORCH_CHECK(da.dim() == u.dim() && da.size(-1) == arguments.width,
                  "geglu: da is not of the rows of u, of half its width");
  const DeviceGuard guard(u.get_device_index());
  Tensor du = torch::stable::empty_like(u);
  arguments.da = da.const_data_ptr();
  arguments.result = du.mutable_data_ptr();
  op.check_launch(launch_geglu_backward(arguments, current_stream(u.get_device_index())));
  return du;
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("geglu", TORCH_BOX(&eri::geglu));
  m.impl("geglu_backward", TORCH_BOX(&eri::geglu_backward));
}
