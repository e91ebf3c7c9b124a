// Checks of `eri::adamw_` and its CUDA implementation; the schema is in eri/layers/adamw.py.
//
// Only PyTorch's stable ABI is used, so one build serves several versions of PyTorch and Python.

#include "adamw.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(const char* name, const Tensor& found, ScalarType type, int64_t count, int32_t device) {
  STD_TORCH_CHECK(found.is_cuda() && found.get_device_index() == device, "adamw_: ", name,
                  " is not on cuda:", device, " as master is");
  STD_TORCH_CHECK(found.scalar_type() == type, "adamw_: ", name, " is not of type ", type);
  STD_TORCH_CHECK(found.dim() == 1 && found.numel() == count && found.is_contiguous(), "adamw_: ",
                  name, " is not one contiguous row of ", count, " elements; it has ",
                  found.numel(), " in ", found.dim(), " dimensions");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 16 == 0, "adamw_: ", name,
                  " does not begin at a multiple of 16 bytes");
}

eri::Shadow shadow_type(const std::optional<Tensor>& shadow) {
  if (!shadow.has_value()) return eri::Shadow::kNone;
  const ScalarType type = shadow->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "adamw_: shadow is of type ", type, ", expected bfloat16 or float16");
  return type == ScalarType::Half ? eri::Shadow::kFloat16 : eri::Shadow::kBFloat16;
}

void adamw_(const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq,
            const Tensor& grad, const std::optional<Tensor>& shadow, const Tensor& control,
            const Tensor& workspace, double beta1, double beta2, double eps, double weight_decay,
            double max_grad_norm, int64_t growth_interval) {
  const int64_t n = master.numel();
  const int32_t device = master.get_device_index();
  check("master", master, ScalarType::Float, n, device);
  check("exp_avg", exp_avg, ScalarType::Float, n, device);
  check("exp_avg_sq", exp_avg_sq, ScalarType::Float, n, device);
  check("grad", grad, ScalarType::Float, n, device);
  check("control", control, ScalarType::Float, eri::kControlSize, device);
  check("workspace", workspace, ScalarType::Byte, eri::kAdamwWorkspaceBytes, device);
  if (shadow.has_value()) check("shadow", *shadow, shadow->scalar_type(), n, device);

  eri::AdamwArguments arguments = {};
  arguments.master = static_cast<float*>(master.mutable_data_ptr());
  arguments.exp_avg = static_cast<float*>(exp_avg.mutable_data_ptr());
  arguments.exp_avg_sq = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  arguments.grad = static_cast<float*>(grad.mutable_data_ptr());
  arguments.shadow = shadow.has_value() ? shadow->mutable_data_ptr() : nullptr;
  arguments.shadow_type = shadow_type(shadow);
  arguments.control = static_cast<float*>(control.mutable_data_ptr());
  arguments.workspace = workspace.mutable_data_ptr();
  arguments.n = n;
  arguments.beta1 = beta1;
  arguments.beta2 = beta2;
  arguments.eps = eps;
  arguments.weight_decay = weight_decay;
  arguments.max_grad_norm = max_grad_norm;
  arguments.growth_interval = growth_interval;

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = eri::launch_adamw(arguments, stream);
  STD_TORCH_CHECK(error == nullptr, "adamw_: CUDA says: ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }
