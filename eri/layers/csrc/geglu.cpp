// Checks of `eri::geglu` and `eri::geglu_backward` and their CUDA implementation; the schemas are
// in eri/layers/geglu.py.

#include "geglu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

eri::GegluType type_of(const Tensor& u) {
  const ScalarType type = u.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "geglu: u is of type ", type, ", expected float32, float16 or bfloat16");
  if (type == ScalarType::Float) return eri::GegluType::kFloat;
  return type == ScalarType::Half ? eri::GegluType::kHalf : eri::GegluType::kBFloat16;
}

void check(const char* name, const Tensor& found) {
  STD_TORCH_CHECK(found.is_cuda() && found.is_contiguous(), "geglu: ", name,
                  " is not contiguous on a CUDA device");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 16 == 0, "geglu: ", name,
                  " does not begin at a multiple of 16 bytes");
}

// All that follows from u; `da` and `result` are left to the caller.
eri::GegluArguments arguments_of(const Tensor& u) {
  check("u", u);
  STD_TORCH_CHECK(u.dim() > 0 && u.size(-1) > 0, "geglu: u has no last dimension");
  eri::GegluArguments arguments = {};
  arguments.u = u.const_data_ptr();
  arguments.type = type_of(u);
  arguments.width = u.size(-1) / 2;
  arguments.rows = u.numel() / u.size(-1);
  const int64_t vector = arguments.type == eri::GegluType::kFloat ? 4 : 8;
  STD_TORCH_CHECK(u.size(-1) % (2 * vector) == 0, "geglu: the last dimension of u is ", u.size(-1),
                  ", expected a multiple of ", 2 * vector);
  STD_TORCH_CHECK(u.numel() < eri::kGegluElements, "geglu: u has ", u.numel(),
                  " elements, expected fewer than ", eri::kGegluElements);
  return arguments;
}

void* current_stream(const Tensor& u) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(u.get_device_index(), &stream));
  return stream;
}

Tensor geglu(const Tensor& u) {
  eri::GegluArguments arguments = arguments_of(u);
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  const auto of_u = u.sizes();
  std::vector<int64_t> sizes(of_u.begin(), of_u.end());
  sizes.back() = arguments.width;
  Tensor a = torch::stable::new_empty(u, sizes);
  arguments.result = a.mutable_data_ptr();
  const char* error = eri::launch_geglu(arguments, current_stream(u));
  STD_TORCH_CHECK(error == nullptr, "geglu: CUDA says: ", error);
  return a;
}

Tensor geglu_backward(const Tensor& da, const Tensor& u) {
  eri::GegluArguments arguments = arguments_of(u);
  check("da", da);
  STD_TORCH_CHECK(da.get_device_index() == u.get_device_index() &&
                      da.scalar_type() == u.scalar_type() && da.dim() == u.dim() &&
                      da.size(-1) == arguments.width && 2 * da.numel() == u.numel(),
                  "geglu_backward: da is not of the device, type and rows of u, of half its width");
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor du = torch::stable::empty_like(u);
  arguments.da = da.const_data_ptr();
  arguments.result = du.mutable_data_ptr();
  const char* error = eri::launch_geglu_backward(arguments, current_stream(u));
  STD_TORCH_CHECK(error == nullptr, "geglu_backward: CUDA says: ", error);
  return du;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_backward", TORCH_BOX(&geglu_backward));
}
