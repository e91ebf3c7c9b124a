// Checks of `eri::geglu_backward_lora` and its CUDA implementation; the schema is in
// eri/layers/geglu_lora.py.

#include "geglu_lora.h"

#include <tuple>
#include <vector>

#include "op.h"

namespace eri {
namespace {

const Op op = {"geglu_backward_lora"};

struct Small {
  int64_t stride;
  int64_t ranks;
};

Small check_small(const char* name, const Tensor& found, int64_t rows, const Tensor& beside) {
  op.check_kind(name, found, beside.get_device_index(), beside.scalar_type());
  const int64_t ranks = found.dim() == 2 ? found.size(1) : 0;
  STD_TORCH_CHECK(ranks > 0 && ranks % 8 == 0 && ranks <= kGegluLoraRanks, op.name, ": ", name,
                  " has ", ranks, " columns, expected a multiple of 8 up to ", kGegluLoraRanks);
  return {op.check_rows(name, found, rows, ranks), ranks};
}

Tensor matrix_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

float* check_total(const char* name, const Tensor& found, const Tensor& beside, int64_t rows,
                   int64_t columns) {
  op.check_kind(name, found, beside.get_device_index(), ScalarType::Float);
  STD_TORCH_CHECK(found.dim() == 2 && found.size(0) == rows && found.size(1) == columns &&
                      found.is_contiguous(),
                  op.name, ": ", name, " is not [", rows, ", ", columns, "] and contiguous");
  return static_cast<float*>(found.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> geglu_backward_lora(const Tensor& da, const Tensor& u, const Tensor& p,
                                               const Tensor& h, const Tensor& d_down,
                                               const Tensor& d_up, const Tensor& up,
                                               double scale) {
  STD_TORCH_CHECK(u.dim() == 2 && u.size(1) > 0 && u.size(1) % 16 == 0, op.name,
                  ": u is not [rows, 2 * width] with a width that is a multiple of 8");
  GegluLoraArguments arguments = {};
  arguments.type = op.float_type("u", u);
  STD_TORCH_CHECK(arguments.type != FloatType::kFloat, op.name,
                  ": u is of type Float, expected float16 or bfloat16");
  arguments.rows = u.size(0);
  arguments.width = u.size(1) / 2;
  STD_TORCH_CHECK(arguments.rows < kGegluLoraRows && arguments.width < kGegluLoraRows, op.name,
                  ": u has ", arguments.rows, " rows of ", u.size(1), ", expected less than ",
                  kGegluLoraRows);
  op.check_kind("u", u, u.get_device_index(), u.scalar_type());
  arguments.u_stride = op.check_rows("u", u, arguments.rows, u.size(1));
  op.check_kind("da", da, u.get_device_index(), u.scalar_type());
  arguments.da_stride = op.check_rows("da", da, arguments.rows, arguments.width);
  const Small of_p = check_small("p", p, arguments.rows, u);
  const Small of_h = check_small("h", h, arguments.rows, u);
  arguments.out_rank = d_down.dim() == 2 ? d_down.size(0) : 0;
  arguments.in_rank = d_up.dim() == 2 ? d_up.size(1) : 0;
  STD_TORCH_CHECK(0 < arguments.out_rank && arguments.out_rank <= of_p.ranks &&
                      0 < arguments.in_rank && arguments.in_rank <= of_h.ranks,
                  op.name, ": p and h have ", of_p.ranks, " and ", of_h.ranks,
                  " columns for ranks ", arguments.out_rank, " and ", arguments.in_rank);
  arguments.d_down = check_total("d_down", d_down, u, arguments.out_rank, arguments.width);
  arguments.d_up = check_total("d_up", d_up, u, 2 * arguments.width, arguments.in_rank);
  op.check_kind("up", up, u.get_device_index(), u.scalar_type());
  arguments.up_stride = op.check_rows("up", up, of_h.ranks, u.size(1));
  const DeviceGuard guard(u.get_device_index());
  Tensor du = matrix_like(u, {arguments.rows, 2 * arguments.width + of_h.ranks});
  Tensor hidden = matrix_like(u, {arguments.rows, of_h.ranks});
  Tensor work = torch::stable::new_empty(
      u, std::vector<int64_t>{geglu_lora_slabs(arguments.width), arguments.rows, of_h.ranks},
      ScalarType::Float);
  arguments.da = da.const_data_ptr();
  arguments.u = u.const_data_ptr();
  arguments.du = du.mutable_data_ptr();
  arguments.du_stride = 2 * arguments.width + of_h.ranks;
  arguments.up = up.const_data_ptr();
  arguments.hidden = hidden.mutable_data_ptr();
  arguments.work = work.mutable_data_ptr();
  arguments.scale = static_cast<float>(scale);
  arguments.p = p.const_data_ptr();
  arguments.h = h.const_data_ptr();
  arguments.p_stride = of_p.stride;
  arguments.h_stride = of_h.stride;
  arguments.out_ranks = of_p.ranks;
  arguments.in_ranks = of_h.ranks;
  op.check_launch(launch_geglu_lora(arguments, current_stream(u.get_device_index())));
  return {du, hidden};
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("geglu_backward_lora", TORCH_BOX(&eri::geglu_backward_lora));
}
