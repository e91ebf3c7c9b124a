// Checks of `eri::adamw_` and its CUDA implementation; the schema is in eri/layers/adamw.py.

#include "adamw.h"

#include "op.h"

namespace eri {
namespace {

const Op op = {"adamw_"};

void check(const char* name, const Tensor& found, ScalarType type, int64_t count, int32_t device) {
  op.check_kind(name, found, device, type);
  STD_TORCH_CHECK(found.dim() == 1 && found.numel() == count && found.is_contiguous(), "adamw_: ",
                  name, " is not one contiguous row of ", count, " elements; it has ",
                  found.numel(), " in ", found.dim(), " dimensions");
  op.check_aligned(name, found);
}

void adamw_(const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq,
            const Tensor& grad, const Tensor& control, const Tensor& workspace, double beta1,
            double beta2, double eps, double weight_decay, double max_grad_norm,
            int64_t growth_interval) {
  const int64_t n = master.numel();
  const int32_t device = master.get_device_index();
  check("master", master, ScalarType::Float, n, device);
  check("exp_avg", exp_avg, ScalarType::Float, n, device);
  check("exp_avg_sq", exp_avg_sq, ScalarType::Float, n, device);
  check("grad", grad, ScalarType::Float, n, device);
  check("control", control, ScalarType::Float, kControlSize, device);
  check("workspace", workspace, ScalarType::Byte, kAdamwWorkspaceBytes, device);

  AdamwArguments arguments = {};
  arguments.master = static_cast<float*>(master.mutable_data_ptr());
  arguments.exp_avg = static_cast<float*>(exp_avg.mutable_data_ptr());
  arguments.exp_avg_sq = static_cast<float*>(exp_avg_sq.mutable_data_ptr());
  arguments.grad = static_cast<float*>(grad.mutable_data_ptr());
  arguments.control = static_cast<float*>(control.mutable_data_ptr());
  arguments.workspace = workspace.mutable_data_ptr();
  arguments.n = n;
  arguments.beta1 = beta1;
  arguments.beta2 = beta2;
  arguments.eps = eps;
  arguments.weight_decay = weight_decay;
  arguments.max_grad_norm = max_grad_norm;
  arguments.growth_interval = growth_interval;

  const DeviceGuard guard(device);
  op.check_launch(launch_adamw(arguments, current_stream(device)));
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) { m.impl("adamw_", TORCH_BOX(&eri::adamw_)); }
