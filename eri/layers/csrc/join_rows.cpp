// Checks of `eri::join_rows` and its CUDA implementation; the schema is in eri/layers/join_rows.py.

#include "join_rows.h"

#include <optional>

#include "op.h"

namespace eri {
namespace {

const Op op = {"join_rows"};

Tensor join_rows(const Tensor& first, const std::optional<Tensor>& second,
                 const std::optional<Tensor>& third, int64_t tail) {
  STD_TORCH_CHECK(first.dim() == 2, "join_rows: the first has ", first.dim(),
                  " dimensions, expected 2");
  STD_TORCH_CHECK(second || !third, "join_rows: there is a third, but no second");
  const FloatType type = op.float_type("first", first);
  const int64_t vector = vector_size(type), rows = first.size(0), width = first.size(1);
  const int32_t device = first.get_device_index();
  op.check_tail(tail, type);
  STD_TORCH_CHECK(width > 0 && width % vector == 0, "join_rows: rows have ", width,
                  " elements, expected a multiple of ", vector);
  JoinRowsArguments arguments = {};
  const auto add = [&](const char* name, const Tensor& part) {
    op.check_kind(name, part, device, first.scalar_type());
    arguments.strides[arguments.count] = op.check_rows(name, part, rows, width) / vector;
    arguments.parts[arguments.count] = part.const_data_ptr();
    ++arguments.count;
  };
  add("first", first);
  if (second) add("second", *second);
  if (third) add("third", *third);
  const int64_t whole = arguments.count * width + tail;
  STD_TORCH_CHECK(rows * whole / vector < (1LL << 32), "join_rows: ", rows, " rows of ", whole,
                  " elements are too many");
  const DeviceGuard guard(device);
  Tensor result = torch::stable::new_empty(first, {rows, whole});
  arguments.result = result.mutable_data_ptr();
  arguments.rows = rows;
  arguments.width = width / vector;
  arguments.result_stride = whole / vector;
  op.check_launch(launch_join_rows(arguments, current_stream(device)));
  return result;
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) { m.impl("join_rows", TORCH_BOX(&eri::join_rows)); }
