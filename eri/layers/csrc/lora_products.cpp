// Checks of `eri::lora_down`, `eri::join_rows_narrow`, `eri::lora_gradient` and
// `eri::lora_gradients` and their CUDA implementation; the schemas are in
// eri/layers/lora_products.py and eri/layers/narrow.py.

#include "lora_products.h"

#include <optional>
#include <tuple>
#include <vector>

#include "op.h"

namespace eri {
namespace {

constexpr int64_t kMost = 1LL << 30;  // rows or columns, exclusive

// Rows, perhaps with a gap between them, each at a multiple of 16 bytes.
void check_rows(const Op& op, const char* name, const Tensor& found, const Tensor& beside) {
  op.check_kind(name, found, beside.get_device_index(), beside.scalar_type());
  op.check_aligned(name, found);
  STD_TORCH_CHECK(found.dim() == 2 && found.size(0) < kMost && found.size(1) < kMost, op.name, ": ",
                  name, " is not a matrix of less than 2^30 rows and columns");
  const int64_t vector = vector_size(op.float_type(name, found));
  STD_TORCH_CHECK(found.size(1) < 2 || found.stride(1) == 1, op.name, ": ", name,
                  " has numbers that lie apart in a row");
  STD_TORCH_CHECK(found.size(1) % vector == 0 && (found.size(0) < 2 || found.stride(0) % vector == 0),
                  op.name, ": ", name, " has rows of ", found.size(1), " elements every ",
                  found.stride(0), ", expected multiples of ", vector);
}

// Of a row in numbers; PyTorch leaves it open where there is one row.
int64_t stride_of(const Tensor& rows) {
  return rows.size(0) < 2 ? rows.size(1) : rows.stride(0);
}

void check_ranks(const Op& op, int64_t ranks) {
  STD_TORCH_CHECK(ranks > 0 && ranks % 8 == 0, op.name, ": a group has ", ranks,
                  " ranks, expected a multiple of 8");
}

// What rows like those of `beside` are multiplied with.
void check_down(const Op& op, LoraDownArguments& arguments, const Tensor& down, int64_t groups,
                double scale, const Tensor& beside) {
  check_rows(op, "down", down, beside);
  STD_TORCH_CHECK(groups > 0 && down.size(0) % groups == 0, op.name, ": down has ", down.size(0),
                  " rows, expected a multiple of ", groups, " groups");
  arguments.type = op.float_type("down", down);
  arguments.tokens = beside.size(0);
  arguments.down = down.const_data_ptr();
  arguments.down_stride = stride_of(down);
  arguments.scale = static_cast<float>(scale);
  arguments.width = down.size(1);
  arguments.ranks = down.size(0) / groups;
  arguments.groups = groups;
  check_ranks(op, arguments.ranks);
  STD_TORCH_CHECK(down.size(0) <= kLoraMostRanks, op.name, ": down has ", down.size(0),
                  " rows, expected at most ", kLoraMostRanks);
}

// The products [tokens, groups * ranks], of rows that are there or are joined.
Tensor queue_down(const Op& op, LoraDownArguments& arguments, const Tensor& rows) {
  const std::vector<int64_t> sizes = {arguments.tokens, arguments.groups * arguments.ranks};
  Tensor hidden = torch::stable::new_empty(rows, sizes);
  arguments.rows = rows.mutable_data_ptr();
  arguments.stride = stride_of(rows);
  arguments.hidden = hidden.mutable_data_ptr();
  op.check_launch(launch_lora_down(arguments, current_stream(rows.get_device_index())));
  return hidden;
}

Tensor lora_down(const Tensor& rows, const Tensor& down, int64_t groups, double scale) {
  const Op op = {"lora_down"};
  check_rows(op, "rows", rows, rows);
  LoraDownArguments arguments = {};
  check_down(op, arguments, down, groups, scale, rows);
  const int64_t columns = groups * down.size(1);
  arguments.has_tail = rows.size(1) == columns + down.size(0);
  STD_TORCH_CHECK(arguments.has_tail || rows.size(1) == columns, "lora_down: rows has ",
                  rows.size(1), " columns, expected ", groups, " of ", down.size(1), ", and ",
                  down.size(0), " or none behind them");
  STD_TORCH_CHECK(!arguments.has_tail || rows.size(0) < 2 || rows.stride(0) >= rows.size(1),
                  "lora_down: rows share memory, and their tails are written");
  const DeviceGuard guard(rows.get_device_index());
  return queue_down(op, arguments, rows);
}

std::tuple<Tensor, Tensor> join_rows_narrow(const Tensor& first,
                                            const std::optional<Tensor>& second,
                                            const std::optional<Tensor>& third, const Tensor& down,
                                            double scale) {
  const Op op = {"join_rows_narrow"};
  STD_TORCH_CHECK(second || !third, "join_rows_narrow: there is a third, but no second");
  STD_TORCH_CHECK(op.float_type("first", first) != FloatType::kFloat,
                  "join_rows_narrow: first is of type Float, expected float16 or bfloat16");
  LoraDownArguments arguments = {};
  const auto add = [&](const char* name, const Tensor& part) {
    check_rows(op, name, part, first);
    STD_TORCH_CHECK(part.size(0) == first.size(0) && part.size(1) == first.size(1),
                    "join_rows_narrow: ", name, " is [", part.size(0), ", ", part.size(1),
                    "], expected [", first.size(0), ", ", first.size(1), "]");
    arguments.sources[arguments.groups] = part.const_data_ptr();
    arguments.source_strides[arguments.groups] = stride_of(part);
    ++arguments.groups;
  };
  add("first", first);
  if (second) add("second", *second);
  if (third) add("third", *third);
  check_down(op, arguments, down, arguments.groups, scale, first);
  STD_TORCH_CHECK(down.size(1) == first.size(1) && down.size(1) > 0, "join_rows_narrow: down has ",
                  down.size(1), " columns, expected ", first.size(1), ", and one or more");
  arguments.has_tail = true;
  const int64_t columns = arguments.groups * (arguments.width + arguments.ranks);
  const DeviceGuard guard(first.get_device_index());
  const std::vector<int64_t> sizes = {arguments.tokens, columns};
  Tensor rows = torch::stable::new_empty(first, sizes);
  Tensor hidden = queue_down(op, arguments, rows);
  return {rows, hidden};
}

void check_total(const Op& op, const char* name, const Tensor& found, const Tensor& beside) {
  op.check_kind(name, found, beside.get_device_index(), ScalarType::Float);
  STD_TORCH_CHECK(found.is_contiguous(), op.name, ": ", name, " is not contiguous");
}

LoraGradientArguments gradient_of(const Op& op, const Tensor& dy, const Tensor& x, const Tensor& p,
                                  const Tensor& h, const Tensor& d_down, const Tensor& d_up) {
  check_rows(op, "dy", dy, dy);
  check_rows(op, "x", x, dy);
  check_rows(op, "p", p, dy);
  check_rows(op, "h", h, dy);
  check_total(op, "d_down", d_down, dy);
  check_total(op, "d_up", d_up, dy);
  STD_TORCH_CHECK(d_up.dim() == 3 && d_up.size(0) > 0, op.name, ": d_up is not [n, N, r]");
  const int64_t layers = d_up.size(0);
  LoraGradientArguments arguments = {};
  arguments.type = op.float_type("dy", dy);
  arguments.tokens = dy.size(0);
  arguments.outputs = d_up.size(1);
  arguments.rank = d_up.size(2);
  arguments.layers = layers;
  arguments.inputs = x.size(1);
  arguments.ranks = p.size(1) / layers;
  check_ranks(op, arguments.ranks);
  STD_TORCH_CHECK(arguments.rank <= arguments.ranks && p.size(1) == layers * arguments.ranks &&
                      p.size(1) <= kLoraMostRanks,
                  op.name, ": p has ", p.size(1), " columns for ", layers, " layers of rank ",
                  arguments.rank, ", expected at most ", kLoraMostRanks);
  STD_TORCH_CHECK(dy.size(1) == layers * arguments.outputs, op.name, ": dy has ", dy.size(1),
                  " columns, expected ", layers, " times ", arguments.outputs);
  STD_TORCH_CHECK(h.size(1) == p.size(1), op.name, ": h has ", h.size(1), " columns, p ",
                  p.size(1));
  STD_TORCH_CHECK(x.size(0) == dy.size(0) && p.size(0) == dy.size(0) && h.size(0) == dy.size(0),
                  op.name, ": dy, x, p and h have ", dy.size(0), ", ", x.size(0), ", ",
                  p.size(0), " and ", h.size(0), " rows");
  STD_TORCH_CHECK(arguments.outputs % vector_size(arguments.type) == 0,
                  op.name, ": a layer has ", arguments.outputs, " outputs, expected a multiple of ",
                  vector_size(arguments.type));
  STD_TORCH_CHECK(d_down.dim() == 2 && d_down.size(0) == layers * arguments.rank &&
                      d_down.size(1) == x.size(1),
                  op.name, ": d_down is not [", layers * arguments.rank, ", ", x.size(1), "]");
  arguments.dy = dy.const_data_ptr();
  arguments.x = x.const_data_ptr();
  arguments.p = p.const_data_ptr();
  arguments.h = h.const_data_ptr();
  arguments.d_down = static_cast<float*>(d_down.mutable_data_ptr());
  arguments.d_up = static_cast<float*>(d_up.mutable_data_ptr());
  arguments.dy_stride = stride_of(dy);
  arguments.x_stride = stride_of(x);
  arguments.p_stride = stride_of(p);
  arguments.h_stride = stride_of(h);
  return arguments;
}

void lora_gradient(const Tensor& dy, const Tensor& x, const Tensor& p, const Tensor& h,
                   const Tensor& d_down, const Tensor& d_up) {
  const Op op = {"lora_gradient"};
  const LoraGradientArguments arguments = gradient_of(op, dy, x, p, h, d_down, d_up);
  const DeviceGuard guard(dy.get_device_index());
  op.check_launch(launch_lora_gradients(&arguments, 1, current_stream(dy.get_device_index())));
}

using Tensors = std::vector<Tensor>;

void lora_gradients(Tensors dy, Tensors x, Tensors p, Tensors h, Tensors d_down, Tensors d_up) {
  const Op op = {"lora_gradients"};
  const size_t count = dy.size();
  STD_TORCH_CHECK(count > 0 && count <= kLoraGradients && x.size() == count && p.size() == count &&
                      h.size() == count && d_down.size() == count && d_up.size() == count,
                  "lora_gradients: ", count, " of dy, expected 1 to ", kLoraGradients,
                  ", and as many of all others");
  LoraGradientArguments arguments[kLoraGradients] = {};
  for (size_t i = 0; i < count; ++i) {
    op.check_kind("dy", dy[i], dy[0].get_device_index(), dy[0].scalar_type());
    arguments[i] = gradient_of(op, dy[i], x[i], p[i], h[i], d_down[i], d_up[i]);
  }
  const DeviceGuard guard(dy[0].get_device_index());
  op.check_launch(launch_lora_gradients(arguments, static_cast<int>(count),
                                        current_stream(dy[0].get_device_index())));
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("lora_down", TORCH_BOX(&eri::lora_down));
  m.impl("join_rows_narrow", TORCH_BOX(&eri::join_rows_narrow));
  m.impl("lora_gradient", TORCH_BOX(&eri::lora_gradient));
  m.impl("lora_gradients", TORCH_BOX(&eri::lora_gradients));
}
